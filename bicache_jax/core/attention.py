"""Prefix attention: its signature, and the plain-JAX form that is its specification and the CPU path.

Suffix queries attend to the KV of a prefix and of their own suffix, bidirectionally, in one softmax. Several rows may
use the same prefix. Its KV are then stored once and never copied per row.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bicache_jax.core.kv import KV, Quantized
from bicache_jax.core.numerics import precision

# Scores held at a time. On CPUs 6 MiB: more than a core's cache, but large enough for products that use several cores.
SCORES = {"cpu": 3 << 19, "accelerator": 1 << 26}


@runtime_checkable
class Attention(Protocol):
    """The signature of every implementation; see `prefix_attention`."""

    def __call__(
        self,
        q: Array,
        k_prefix: KV,
        v_prefix: KV,
        k_suffix: Array,
        v_suffix: Array,
        *,
        prefix_index: Array | None = None,
        prefix_len: Array,
        suffix_valid: Array,
        block_ids: tuple[Array, Array] | None = None,
        scale: float | None = None,
        layer: Array | int | None = None,
    ) -> Array:
        """Attends; see `prefix_attention`."""
        ...


def prefix_attention(
    q: Float[Array, "B N T H"],
    k_prefix: Float[Array, "*L G K P H"] | Quantized,
    v_prefix: Float[Array, "*L G K P H"] | Quantized,
    k_suffix: Float[Array, "B K S H"],
    v_suffix: Float[Array, "B K S H"],
    *,
    prefix_index: Int[Array, " B"] | None = None,
    prefix_len: Int[Array, " G"],
    suffix_valid: Bool[Array, "B S"],
    block_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    scale: float | None = None,
    layer: Int[Array, ""] | int | None = None,
) -> Float[Array, "B N T H"]:
    """Attention of suffix queries over a shared prefix and their own suffix, one softmax over both.

    It processes a few heads of one row at a time, or some queries of one head, as many as `SCORES` allows. Only their
    scores are held in memory, and a shared prefix is never copied for every row. Of a prefix in 8 bits, the integers of
    these heads become floats, which is exact in every dtype.

    Args:
        q: queries, rotated.
        k_prefix: prefix keys, rotated; `[G, K, P, H]`, or the stack `[L, G, K, P, H]` when `layer` is given. In 8 bits
            they stand for `values * scales`: a key's scale is a factor of its scores.
        v_prefix: prefix values, like `k_prefix`, and in 8 bits where that is. A value's scale is a factor of its
            probability where that meets the value, and not of the sum that divides it.
        k_suffix: suffix keys, rotated.
        v_suffix: suffix values.
        prefix_index: which prefix each row uses; None: each row has its own (G = B).
        prefix_len: valid tokens of each prefix, 0 allowed.
        suffix_valid: which suffix tokens may be attended to.
        block_ids: under block-causal attention, the block of each query and of each suffix token: a query sees the
            prefix, and the suffix tokens of its own block and of lower ones. None: full attention, it sees all.
        scale: factor of the scores; None: `H ** -0.5`.
        layer: layer of a stacked prefix cache; may be traced.

    Returns:
        Attended values in `q`'s dtype. Softmax statistics are float32. A row without valid keys gives zeros.
    """
    num_rows, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_prefix = k_suffix.shape[1], k_prefix.shape[-2]
    num_keys = num_prefix + k_suffix.shape[2]
    if not num_keys or not q.size:
        return jnp.zeros_like(q)
    scale = head_dim**-0.5 if scale is None else scale
    high = precision(q.dtype)
    lowest = float(jnp.finfo(jnp.float32).min)  # finite: with nothing valid, -inf - -inf would be nan
    # Query heads of one KV head are adjacent: they act as more queries on the same keys.
    q_bkmh = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads * num_queries, head_dim)
    heads, tile = _tiles(num_kv_heads, q_bkmh.shape[2], num_keys)
    prefix_valid = jnp.arange(num_prefix) < prefix_len[:, None]
    block_bm = None if block_ids is None else jnp.tile(block_ids[0], (1, num_heads // num_kv_heads))

    def shared(stack: Array, g: Array, k: Array) -> Array:
        """The heads' part of a prefix, [n, *, *]."""
        stack = stack if layer is not None else stack[None]
        at = (0 if layer is None else layer, g, k, 0, 0)
        return jax.lax.dynamic_slice(stack, at, (1, 1, heads, *stack.shape[-2:]))[0, 0]

    def keys(prefix: KV, suffix: Array, g: Array, b: Array, k: Array) -> tuple[Array, Array | None]:
        """The heads' keys or values [n, S, H], prefix and suffix joined; small compared with their scores.

        And their scales [n, 1, S]; None: all are 1.
        """
        own = jax.lax.dynamic_slice(suffix, (b, k, 0, 0), (1, heads, *suffix.shape[2:]))[0]
        values, scales = (prefix.values, prefix.scales) if isinstance(prefix, Quantized) else (prefix, None)
        if scales is None:
            return jnp.concatenate([shared(values, g, k), own], axis=1), None
        ones = jnp.ones((heads, 1, own.shape[1]), scales.dtype)
        joined = jnp.concatenate([shared(values, g, k).astype(own.dtype), own], axis=1)
        return joined, jnp.concatenate([shared(scales, g, k), ones], axis=2)

    def some_heads(index: Array, out_bkmh: Array) -> Array:
        k, b = jnp.divmod(index, num_rows)  # rows innermost: adjacent rows find their shared prefix in the CPU cache
        k, g = k * heads, b if prefix_index is None else prefix_index[b]
        k_nsh, k_scale = keys(k_prefix, k_suffix, g, b, k)
        v_nsh, v_scale = keys(v_prefix, v_suffix, g, b, k)
        valid_s = jnp.concatenate([prefix_valid[g], suffix_valid[b]])

        def some_queries(index: Array, out_bkmh: Array) -> Array:
            # The last tile is a full one too: it overlaps the tile before it and computes the same result there.
            start = (b, k, jnp.minimum(index * tile, q_bkmh.shape[2] - tile), 0)
            q_nmh = jax.lax.dynamic_slice(q_bkmh, start, (1, heads, tile, head_dim))[0]
            s_nms = jnp.einsum("nmh,nsh->nms", q_nmh, k_nsh, precision=high, preferred_element_type=jnp.float32)
            s_nms = s_nms if k_scale is None else s_nms * k_scale
            seen_s = valid_s
            if block_ids is not None and block_bm is not None:
                own_m1 = jax.lax.dynamic_slice(block_bm, (b, start[2]), (1, tile)).reshape(tile, 1)
                earlier_ms = block_ids[1][b] <= own_m1
                seen_s &= jnp.concatenate([jnp.ones((tile, num_prefix), bool), earlier_ms], axis=1)
            s_nms = jnp.where(seen_s, s_nms * scale, -jnp.inf)
            p_nms = jnp.exp(s_nms - jnp.max(s_nms, axis=-1, keepdims=True, initial=lowest))
            total = jnp.sum(p_nms, axis=-1, keepdims=True)
            p_nms = p_nms if v_scale is None else p_nms * v_scale
            out_nmh = jnp.einsum(
                "nms,nsh->nmh",
                p_nms.astype(v_nsh.dtype),
                v_nsh,
                precision=high,
                preferred_element_type=jnp.float32,
            )
            out_nmh = (out_nmh / jnp.where(total == 0, 1, total)).astype(q.dtype)
            return jax.lax.dynamic_update_slice(out_bkmh, out_nmh[None], start)

        return jax.lax.fori_loop(0, -(-q_bkmh.shape[2] // tile), some_queries, out_bkmh)

    with jax.named_scope("prefix_attention"):
        turns = num_kv_heads // heads * num_rows
        # The results overwrite the queries: they have the same shape, and under `shard_map` the same type.
        return jax.lax.fori_loop(0, turns, some_heads, q_bkmh).reshape(q.shape)


def _tiles(num_heads: int, num_queries: int, num_keys: int) -> tuple[int, int]:
    """KV heads processed at once, and queries of each: about `SCORES` scores for any number of rows."""
    limit = SCORES["cpu" if jax.default_backend() == "cpu" else "accelerator"]
    fitting = max(1, limit // num_keys)  # rows of scores
    if fitting < num_queries:
        tiles = -(-num_queries // fitting)
        return 1, min(num_queries, -(-num_queries // (8 * tiles)) * 8)
    return max(n for n in range(1, num_heads + 1) if num_heads % n == 0 and n * num_queries <= fitting), num_queries
