"""Prefix attention as one call of a library on NVIDIA GPUs: a row's prefix and suffix side by side, valid tokens first.

A library that knows lengths needs no mask, and cuDNN is fastest without one. That costs a copy of the row's keys and
values in every call, `2 (P + S) K H` numbers read and written: little beside the products of a whole suffix, much
beside those of a block. `bicache doctor --full` times both on the device that is there.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bicache_jax.core.numerics import precision

LIBRARIES = ("xla", "cudnn", "tokamax")
"""Implementations of `jax.nn.dot_product_attention`, and `tokamax`, whose kernels for Hopper are in Mosaic."""


def has(library: str) -> bool:
    """Whether a library is installed."""
    return library != "tokamax" or importlib.util.find_spec("tokamax") is not None


def prefix_attention(
    q: Float[Array, "B N T H"],
    k_prefix: Float[Array, "L G K P H"],
    v_prefix: Float[Array, "L G K P H"],
    k_suffix: Float[Array, "B K S H"],
    v_suffix: Float[Array, "B K S H"],
    index: Int[Array, " B"],
    prefix_len: Int[Array, " G"],
    suffix_valid: Bool[Array, "B S"],
    layer: Int[Array, ""],
    scale: float,
    library: str,
) -> Float[Array, "B N T H"]:
    """`bicache_jax.core.attention.prefix_attention`, for queries that see all valid keys.

    Args:
        q: queries.
        k_prefix: the stack of prefix keys.
        v_prefix: likewise values.
        k_suffix: suffix keys.
        v_suffix: suffix values.
        index: prefix of each row.
        prefix_len: valid tokens of each prefix.
        suffix_valid: which suffix tokens may be attended to.
        layer: layer of the stack.
        scale: factor of the scores.
        library: one of `LIBRARIES`.

    Returns:
        Attended values; zeros where a row has no valid key.
    """
    there = jnp.concatenate([jnp.arange(k_prefix.shape[3]) < prefix_len[index][:, None], suffix_valid], axis=1)
    order, lengths = jnp.argsort(~there, axis=1, stable=True), jnp.sum(there, axis=1, dtype=jnp.int32)

    def joined(prefix: Array, suffix: Array) -> Array:
        whole = jnp.concatenate([prefix[layer, index], suffix], axis=2).swapaxes(1, 2)
        return jnp.take_along_axis(whole, order[:, :, None, None], axis=1)

    k, v = joined(k_prefix, k_suffix), joined(v_prefix, v_suffix)
    out = _attend(q.swapaxes(1, 2), k, v, jnp.maximum(lengths, 1), scale, library).swapaxes(1, 2)
    return jnp.where((lengths > 0)[:, None, None, None], out, 0).astype(q.dtype)


def _attend(q: Array, k: Array, v: Array, lengths: Array, scale: float, library: Any) -> Array:
    """Attention `[B, T, N, H]` over the first `lengths` keys of each row."""
    if library == "tokamax":
        import tokamax

        return tokamax.dot_product_attention(
            q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation=("mosaic", "triton", "xla")
        )
    with jax.default_matmul_precision(precision(q.dtype).name.lower()):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            key_value_seq_lengths=lengths,
            implementation=library,
        )
