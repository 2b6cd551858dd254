"""Encoding a prefix alone: step 1 of BiCache (arXiv 2606.07571, section 4)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from bicache_jax.core.axes import vary_like
from bicache_jax.core.backbone import Backbone, Params, layer_params
from bicache_jax.core.cache import PrefixCache
from bicache_jax.core.config import CacheDtype
from bicache_jax.core.kv import KV, along_tokens, floats, stored, zeros
from bicache_jax.sharding import PER_SHARD, PREFIX, REPLICATED, on_shards, param_specs


@functools.partial(jax.jit, static_argnames=("backbone", "length", "num_layers", "cache_dtype", "mesh"))
def encode(
    backbone: Backbone,
    params: Params,
    prefix_ids: Int[Array, "G P"],
    prefix_len: Int[Array, " G"],
    boundaries: Int[Array, " J"],
    block_length: Int[Array, ""] | None = None,
    before: PrefixCache | None = None,
    *,
    length: int | None = None,
    num_layers: int,
    cache_dtype: CacheDtype = "auto",
    mesh: Mesh | None = None,
) -> PrefixCache:
    """`encode_alone` as a program: on one device, or on a mesh where each data shard has its own prefixes."""
    run = functools.partial(encode_alone, backbone, length=length, num_layers=num_layers, cache_dtype=cache_dtype)
    specs: tuple[Any, ...] = (param_specs(backbone.axes, params), PER_SHARD, PER_SHARD, PER_SHARD, REPLICATED)
    if block_length is None:
        block_length = jnp.asarray(backbone.config.block_length, jnp.int32)
    args: tuple[Any, ...] = (params, prefix_ids, prefix_len, boundaries, block_length)
    if before is not None:
        specs, args = (*specs, PREFIX), (*args, before)
    return on_shards(run, mesh, specs, PREFIX)(*args)


def encode_alone(
    backbone: Backbone,
    params: Params,
    prefix_ids: Int[Array, "G P"],
    prefix_len: Int[Array, " G"],
    boundaries: Int[Array, " J"],
    block_length: Int[Array, ""] | None = None,
    before: PrefixCache | None = None,
    *,
    length: int | None = None,
    num_layers: int,
    cache_dtype: CacheDtype = "auto",
) -> PrefixCache:
    """Runs G prefixes alone and keeps what later steps read.

    Layers below the largest boundary run in full. In the layer at the boundary only K and V are computed. Layers above
    it are skipped, since their prefix input differs from row to row.

    In 8 bits it is what is kept that is rounded: under full attention the prefix's own tokens see each other's keys and
    values as they were. Under block-causal attention they see them as they are kept, so that it makes no difference
    whether the first blocks were encoded before.

    Args:
        backbone: the model (static).
        params: its parameters.
        prefix_ids: prefix tokens, padded to P; behind `before`, those that it lacks.
        prefix_len: tokens in each prefix, those before included.
        boundaries: boundaries in use; entries of L or more are unused slots.
        block_length: tokens of a block, under block-causal attention; blocks are counted from the prefix's end, where
            one ends. None: the model's own.
        before: the encodings of the prefixes' first blocks, under block-causal attention; None: nothing is there yet.
        length: P, where that is not the tokens' padded number (static).
        num_layers: layers of KV to allocate (static); larger than every boundary in use, at most L.
        cache_dtype: how KV are kept (static); `before` is in the same form.

    Returns:
        The cache of the G prefixes.
    """
    config = backbone.config
    num_prefixes, tokens = prefix_ids.shape
    length = tokens if length is None else length
    begun = jnp.zeros((num_prefixes,), jnp.int32) if before is None else before.length
    positions = begun[:, None] + jnp.arange(tokens)
    valid = positions < prefix_len[:, None]
    block_ids = None
    if config.block_causal:
        size = config.block_length if block_length is None else block_length
        blocks = jnp.floor_divide(positions - prefix_len[:, None], size)
        block_ids = (blocks, blocks)
    last = jnp.max(jnp.where(boundaries < config.num_layers, boundaries, 0))
    x = backbone.embed(params, prefix_ids, positions)
    no_prefix = jnp.zeros((num_prefixes, config.num_kv_heads, 0, config.head_dim), x.dtype)
    kv_shape = (num_layers, num_prefixes, config.num_kv_heads, length, config.head_dim)
    cache = PrefixCache(
        k=zeros(kv_shape, x.dtype, cache_dtype),
        v=zeros(kv_shape, x.dtype, cache_dtype),
        hidden=jnp.zeros((boundaries.shape[0], num_prefixes, length, config.d_model), x.dtype),
        boundaries=boundaries,
        length=prefix_len,
    )
    cache = vary_like(cache, x)

    def behind(fresh: KV, kept: KV, index: Array) -> KV:
        """The keys or values of whole prefixes, [G, K, P, H]: what was kept, and then the fresh ones."""
        at = jnp.arange(length) - begun[:, None]

        def join(fresh: Array, kept: Array, axis: int) -> Array:
            kept = jax.lax.dynamic_index_in_dim(kept, index, keepdims=False)
            sides = [(0, 0)] * kept.ndim
            sides[axis] = (0, max(0, length - kept.shape[axis]))
            kept = jax.lax.slice_in_dim(jnp.pad(kept, sides), 0, length, axis=axis)
            where = jnp.expand_dims(at[:, None], -1 if axis == -2 else -2)
            moved = jnp.take_along_axis(fresh, jnp.clip(where, 0, tokens - 1), axis=axis)
            return jnp.where(where >= 0, moved, kept)

        return along_tokens(join, fresh, kept)

    def write(cache: PrefixCache, index: Array, x: Float[Array, "G T D"], k: KV, v: KV) -> PrefixCache:
        if before is not None:
            k, v = behind(k, before.k, index), behind(v, before.v, index)

        def put(stack: Array, layer: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)

        cache = dataclasses.replace(cache, k=jax.tree.map(put, cache.k, k), v=jax.tree.map(put, cache.v, v))
        if before is not None:  # no layer's input is needed where all layers are reused
            return cache
        slot = jnp.where(jnp.any(boundaries == index), jnp.argmax(boundaries == index), boundaries.shape[0])
        return dataclasses.replace(cache, hidden=cache.hidden.at[slot].set(x, mode="drop"))

    def key_value(layer: Any, x: Float[Array, "G T D"]) -> tuple[tuple[KV, KV], tuple[Array, Array]]:
        """A layer's keys and values as they are kept, and as the prefix's own tokens see them."""
        k, v = backbone.key_value(layer, x, positions)
        kept = stored(k, cache_dtype), stored(v, cache_dtype)
        return kept, (floats(kept[0], k.dtype), floats(kept[1], v.dtype)) if config.block_causal else (k, v)

    def body(index: Array, carry: tuple[Array, PrefixCache]) -> tuple[Array, PrefixCache]:
        x, cache = carry
        layer = layer_params(params, index)
        kept, (k, v) = key_value(layer, x)
        cache = write(cache, index, x, *kept)
        q = backbone.query(layer, x, positions)
        if before is None:
            attended = backbone.attention(
                q, no_prefix, no_prefix, k, v, prefix_len=begun, suffix_valid=valid, block_ids=block_ids
            )
        else:
            attended = backbone.attention(
                q,
                before.k,
                before.v,
                k,
                v,
                prefix_len=begun,
                suffix_valid=valid,
                block_ids=block_ids,
                layer=index,
            )
        return backbone.finish(layer, x, attended), cache

    with jax.named_scope("encode_prefix"):
        x, cache = jax.lax.fori_loop(0, last, body, (x, cache))
        kept, _ = key_value(layer_params(params, last), x)
        return write(cache, last, x, *kept)
