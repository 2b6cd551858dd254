"""Keys and values as a cache of prefixes holds them: in the model's dtype, or in 8 bits.

`int8` keeps the H numbers of a token and KV head as integers and one scale, so that each is `values * scales`. A scale
belongs to one token of one head, which has two consequences. What a token's numbers become depends on that token alone,
whoever shares its cache. And attention never needs the floats: a key's scale is a factor of its scores, a value's scale
a factor of its probabilities. So scales lie as a row of scores does, `[..., 1, P]`.

Scales are float32, as the scores and probabilities are that they meet. For H = 128 that makes 132 bytes where bfloat16
has 256; bfloat16 scales would make 130, and every kernel would have to convert them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from bicache_jax.core.config import CacheDtype, ModelConfig
from bicache_jax.core.quantized import in_8_bits

_SCALE = jnp.dtype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """Keys or values in 8 bits: `values * scales`, with the tokens of `scales` along its last axis.

    Attributes:
        values: the integers, -127 to 127.
        scales: the scale of each token and KV head.
    """

    values: Int8[Array, "*L G K P H"]
    scales: Float[Array, "*L G K 1 P"]

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the floats that it stands for."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Likewise."""
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Bytes of both parts."""
        return self.values.nbytes + self.scales.nbytes


KV = Array | Quantized
"""Keys or values of prefixes; without 8 bits a plain array."""


def dtype_of(kv: KV) -> CacheDtype:
    """The form of a cache's keys or values, as `CacheConfig.cache_dtype` names it."""
    return "int8" if isinstance(kv, Quantized) else "auto"


def stored(x: Float[Array, "*L G K P H"], cache_dtype: CacheDtype) -> KV:
    """Keys or values as a cache of this form holds them; in 8 bits each number is off by at most half a scale."""
    if cache_dtype == "auto":
        return x
    values, scales = in_8_bits(x)
    return Quantized(values, scales.swapaxes(-1, -2))


def floats(kv: KV, dtype: Any) -> Float[Array, "*L G K P H"]:
    """The floats that keys or values stand for; for small parts of a cache, and checks."""
    if not isinstance(kv, Quantized):
        return kv
    return (kv.values.astype(jnp.float32) * kv.scales.swapaxes(-1, -2)).astype(dtype)


def zeros(shape: tuple[int, ...], dtype: Any, cache_dtype: CacheDtype) -> KV:
    """Room for keys or values of a shape `[..., K, P, H]`."""
    if cache_dtype == "auto":
        return jnp.zeros(shape, dtype)
    *outer, tokens, _ = shape
    return Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros((*outer, 1, tokens), _SCALE))


def along_tokens(function: Callable[..., Array], *kv: KV) -> KV:
    """Applies a function that treats tokens alike to the parts of keys or values of one form.

    Args:
        function: takes an array of each, and the axis of their tokens counted from the end.
        *kv: keys or values.
    """
    quantized = [one for one in kv if isinstance(one, Quantized)]
    if not quantized:
        return function(*kv, axis=-2)
    parts = ([one.values for one in quantized], [one.scales for one in quantized])
    return Quantized(function(*parts[0], axis=-2), function(*parts[1], axis=-1))


def arrays_of(k: KV, v: KV) -> list[Array]:
    """The arrays of keys and values of one form: both values, and behind them in 8 bits both scales."""
    if isinstance(k, Quantized) and isinstance(v, Quantized):
        return [k.values, v.values, k.scales, v.scales]
    return [k, v]  # type: ignore[list-item]


def token_bytes(config: ModelConfig, itemsize: int, cache_dtype: CacheDtype) -> int:
    """Bytes of a token's K and V in one layer.

    Args:
        config: the architecture, or one shard's part of it.
        itemsize: bytes of a number in the model's dtype.
        cache_dtype: form of the cache.
    """
    of_head = config.head_dim * itemsize if cache_dtype == "auto" else config.head_dim + _SCALE.itemsize
    return 2 * config.num_kv_heads * of_head
