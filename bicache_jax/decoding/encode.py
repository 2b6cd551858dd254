"""Encoding a prefix alone: step 1 of BiCache (arXiv 2606.07571, section 4)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from bicache_jax.core.axes import vary_like
from bicache_jax.core.backbone import Backbone, Params, layer_params
from bicache_jax.core.cache import PrefixCache
from bicache_jax.sharding import PER_SHARD, PREFIX, REPLICATED, on_shards, param_specs


@functools.partial(jax.jit, static_argnames=("backbone", "num_layers", "mesh"))
def encode(
    backbone: Backbone,
    params: Params,
    prefix_ids: Int[Array, "G P"],
    prefix_len: Int[Array, " G"],
    boundaries: Int[Array, " J"],
    block_length: Int[Array, ""] | None = None,
    *,
    num_layers: int,
    mesh: Mesh | None = None,
) -> PrefixCache:
    """`encode_alone` as a program: on one device, or on a mesh where each data shard has its own prefixes."""
    run = functools.partial(encode_alone, backbone, num_layers=num_layers)
    specs = (param_specs(backbone.axes, params), PER_SHARD, PER_SHARD, PER_SHARD, REPLICATED)
    if block_length is None:
        block_length = jnp.asarray(backbone.config.block_length, jnp.int32)
    return on_shards(run, mesh, specs, PREFIX)(params, prefix_ids, prefix_len, boundaries, block_length)


def encode_alone(
    backbone: Backbone,
    params: Params,
    prefix_ids: Int[Array, "G P"],
    prefix_len: Int[Array, " G"],
    boundaries: Int[Array, " J"],
    block_length: Int[Array, ""] | None = None,
    *,
    num_layers: int,
) -> PrefixCache:
    """Runs G prefixes alone and keeps what later steps read.

    Layers below the largest boundary run in full. In the layer at the boundary only K and V are computed. Layers above
    it are skipped, since their prefix input differs from row to row.

    Args:
        backbone: the model (static).
        params: its parameters.
        prefix_ids: prefix tokens, padded to P.
        prefix_len: tokens in each prefix.
        boundaries: boundaries in use; entries of L or more are unused slots.
        block_length: tokens of a block, under block-causal attention; blocks are counted from the prefix's end, where
            one ends. None: the model's own.
        num_layers: layers of KV to allocate (static); larger than every boundary in use, at most L.

    Returns:
        The cache of the G prefixes.
    """
    config = backbone.config
    num_prefixes, length = prefix_ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), (num_prefixes, length))
    valid = positions < prefix_len[:, None]
    block_ids = None
    if config.block_causal:
        size = config.block_length if block_length is None else block_length
        blocks = jnp.floor_divide(positions - prefix_len[:, None], size)
        block_ids = (blocks, blocks)
    last = jnp.max(jnp.where(boundaries < config.num_layers, boundaries, 0))
    x = backbone.embed(params, prefix_ids)
    no_prefix = jnp.zeros((num_prefixes, config.num_kv_heads, 0, config.head_dim), x.dtype)
    kv_shape = (num_layers, num_prefixes, config.num_kv_heads, length, config.head_dim)
    cache = PrefixCache(
        k=jnp.zeros(kv_shape, x.dtype),
        v=jnp.zeros(kv_shape, x.dtype),
        hidden=jnp.zeros((boundaries.shape[0], *x.shape), x.dtype),
        boundaries=boundaries,
        length=prefix_len,
    )
    cache = vary_like(cache, x)

    def write(cache: PrefixCache, index: Array, x: Float[Array, "G P D"], k: Array, v: Array) -> PrefixCache:
        slot = jnp.where(jnp.any(boundaries == index), jnp.argmax(boundaries == index), boundaries.shape[0])
        return PrefixCache(
            k=jax.lax.dynamic_update_index_in_dim(cache.k, k, index, 0),
            v=jax.lax.dynamic_update_index_in_dim(cache.v, v, index, 0),
            hidden=cache.hidden.at[slot].set(x, mode="drop"),
            boundaries=cache.boundaries,
            length=cache.length,
        )

    def body(index: Array, carry: tuple[Array, PrefixCache]) -> tuple[Array, PrefixCache]:
        x, cache = carry
        layer = layer_params(params, index)
        k, v = backbone.key_value(layer, x, positions)
        cache = write(cache, index, x, k, v)
        attended = backbone.attention(
            backbone.query(layer, x, positions),
            no_prefix,
            no_prefix,
            k,
            v,
            prefix_len=jnp.zeros((num_prefixes,), jnp.int32),
            suffix_valid=valid,
            block_ids=block_ids,
        )
        return backbone.finish(layer, x, attended), cache

    with jax.named_scope("encode_prefix"):
        x, cache = jax.lax.fori_loop(0, last, body, (x, cache))
        k, v = backbone.key_value(layer_params(params, last), x, positions)
        return write(cache, last, x, k, v)
