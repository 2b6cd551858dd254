"""Prefix attention: its signature, and the plain-JAX form that is its specification and the CPU path.

Suffix queries attend to the KV of a prefix and to their own, bidirectionally, in one softmax. Several rows may point
at the same prefix, whose KV are then stored once and never copied per row.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bicache_jax.numerics import precision

SCORES = 1 << 20  # scores held at a time: 4 MiB, about what a few cores' caches hold


@runtime_checkable
class Attention(Protocol):
    """The signature that every implementation has; see `prefix_attention`."""

    def __call__(
        self,
        q: Array,
        k_prefix: Array,
        v_prefix: Array,
        k_suffix: Array,
        v_suffix: Array,
        *,
        prefix_index: Array | None = None,
        prefix_len: Array,
        suffix_valid: Array,
        scale: float | None = None,
        layer: Array | int | None = None,
    ) -> Array:
        """Attends; see `prefix_attention`."""
        ...


def prefix_attention(
    q: Float[Array, "B N T H"],
    k_prefix: Float[Array, "*L G K P H"],
    v_prefix: Float[Array, "*L G K P H"],
    k_suffix: Float[Array, "B K S H"],
    v_suffix: Float[Array, "B K S H"],
    *,
    prefix_index: Int[Array, " B"] | None = None,
    prefix_len: Int[Array, " G"],
    suffix_valid: Bool[Array, "B S"],
    scale: float | None = None,
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "B N T H"]:
    """Attention of suffix queries over a shared prefix and their own suffix, one softmax over both.

    Rows and heads are taken a few at a time, as many as `SCORES` allows: their scores are all that is ever held and
    stay in a CPU's cache, and a shared prefix is read where it lies.

    Args:
        q: queries, rotated.
        k_prefix: prefix keys, rotated; `[G, K, P, H]`, or the stack `[L, G, K, P, H]` when `layer` is given.
        v_prefix: prefix values, like `k_prefix`.
        k_suffix: suffix keys, rotated.
        v_suffix: suffix values.
        prefix_index: which prefix a row uses; None: each row its own (G = B).
        prefix_len: valid tokens of each prefix, 0 allowed.
        suffix_valid: which suffix tokens may be attended to.
        scale: factor of the scores; None: `H ** -0.5`.
        layer: layer of a stacked prefix cache; may be traced.

    Returns:
        Attended values in `q`'s dtype; softmax statistics are float32; a row with nothing valid gives zeros.
    """
    num_heads, num_queries, head_dim = q.shape[1:]
    num_kv_heads, num_prefix = k_suffix.shape[1], k_prefix.shape[-2]
    scale = head_dim**-0.5 if scale is None else scale
    high = precision(q.dtype)
    lowest = float(jnp.finfo(jnp.float32).min)  # finite: with nothing valid, -inf - -inf would be nan

    def scores(q_mh: Array, k_sh: Array, valid_s: Array) -> Array:
        s_ms = jnp.einsum("mh,sh->ms", q_mh, k_sh, precision=high, preferred_element_type=jnp.float32)
        return jnp.where(valid_s, s_ms * scale, -jnp.inf)

    def weighted(p_ms: Array, v_sh: Array) -> Array:
        return jnp.einsum(
            "ms,sh->mh", p_ms.astype(v_sh.dtype), v_sh, precision=high, preferred_element_type=jnp.float32
        )

    def head(place: tuple[Array, Array]) -> Array:
        b, k = place
        g = b if prefix_index is None else prefix_index[b]
        shared = (g, k) if layer is None else (layer, g, k)
        s_suffix = scores(q_bkmh[b, k], k_suffix[b, k], suffix_valid[b])
        peak = jnp.max(s_suffix, axis=-1, keepdims=True, initial=lowest)
        if num_prefix:
            s_prefix = scores(q_bkmh[b, k], k_prefix[shared], jnp.arange(num_prefix) < prefix_len[g])
            peak = jnp.maximum(peak, jnp.max(s_prefix, axis=-1, keepdims=True))
        p_suffix = jnp.exp(s_suffix - peak)
        total = jnp.sum(p_suffix, axis=-1, keepdims=True)
        out = weighted(p_suffix, v_suffix[b, k])
        if num_prefix:
            p_prefix = jnp.exp(s_prefix - peak)
            total += jnp.sum(p_prefix, axis=-1, keepdims=True)
            out += weighted(p_prefix, v_prefix[shared])
        return (out / jnp.where(total == 0, 1, total)).astype(q.dtype)

    with jax.named_scope("prefix_attention"):
        num_rows = q.shape[0]
        # Query heads of one KV head stand together: they are more queries on the same keys.
        q_bkmh = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads * num_queries, head_dim)
        rows, heads = jnp.divmod(jnp.arange(num_rows * num_kv_heads), num_kv_heads)
        size = q_bkmh.shape[2] * (num_prefix + k_suffix.shape[2])
        # Heads of one row without a remainder, which a loop would run as a program of its own.
        fitting = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and n * size <= SCORES]
        at_once = max(fitting, default=1) if size else None
        return jax.lax.map(head, (rows, heads), batch_size=at_once).reshape(q.shape)
