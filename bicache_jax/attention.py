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

    Rows are taken one at a time, so that scores of one row are all that is ever held and a prefix is read in place.

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

    def scores(q_kmh: Array, k_ksh: Array, valid_s: Array) -> Array:
        s_kms = jnp.einsum("kmh,ksh->kms", q_kmh, k_ksh, precision=high, preferred_element_type=jnp.float32)
        return jnp.where(valid_s, s_kms * scale, -jnp.inf)

    def weighted(p_kms: Array, v_ksh: Array) -> Array:
        return jnp.einsum(
            "kms,ksh->kmh", p_kms.astype(v_ksh.dtype), v_ksh, precision=high, preferred_element_type=jnp.float32
        )

    def row(b: Array) -> Array:
        g = b if prefix_index is None else prefix_index[b]
        place = (g,) if layer is None else (layer, g)
        q_kmh = q[b].reshape(num_kv_heads, num_heads // num_kv_heads * num_queries, head_dim)
        s_suffix = scores(q_kmh, k_suffix[b], suffix_valid[b])
        peak = jnp.max(s_suffix, axis=-1, keepdims=True, initial=lowest)
        if num_prefix:
            s_prefix = scores(q_kmh, k_prefix[place], jnp.arange(num_prefix) < prefix_len[g])
            peak = jnp.maximum(peak, jnp.max(s_prefix, axis=-1, keepdims=True))
        p_suffix = jnp.exp(s_suffix - peak)
        total = jnp.sum(p_suffix, axis=-1, keepdims=True)
        out = weighted(p_suffix, v_suffix[b])
        if num_prefix:
            p_prefix = jnp.exp(s_prefix - peak)
            total += jnp.sum(p_prefix, axis=-1, keepdims=True)
            out += weighted(p_prefix, v_prefix[place])
        return (out / jnp.where(total == 0, 1, total)).astype(q.dtype).reshape(num_heads, num_queries, head_dim)

    with jax.named_scope("prefix_attention"):
        return jax.lax.map(row, jnp.arange(q.shape[0]))
