"""What a model sees in one canvas: a pass over rows whose responses hold any tokens and masks."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bicache_jax.core.axes import vary_like
from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.cache import DeepCache, PrefixCache, Rows, SuffixCache
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.kv import dtype_of, zeros
from bicache_jax.decoding.forward import SuffixForward


def room_for_deep(config: ModelConfig, cache: PrefixCache, rows: Rows, layers: int) -> DeepCache:
    """Room for the rows' deep prefix KV; none where nothing is ever refreshed.

    Args:
        config: the architecture, or a shard's part of it.
        cache: the G prefixes.
        rows: the rows.
        layers: layers above the boundary to make room for, at least `L - 1 - b`.
    """
    num_prefix = cache.k.shape[-2]
    layers = 0 if config.block_causal or not num_prefix else layers
    shape = (layers, rows.tokens.shape[0], config.num_kv_heads, num_prefix, config.head_dim)
    deep = zeros(shape, cache.hidden.dtype, dtype_of(cache.k))
    return vary_like(DeepCache(deep, deep), rows)


def look(
    backbone: Backbone,
    params: Params,
    cache: PrefixCache,
    rows: Rows,
    deep: DeepCache,
    boundary: Int[Array, ""],
    block_length: Int[Array, ""],
    *,
    width: int,
    refresh: bool = True,
) -> tuple[Float[Array, "B W D"], DeepCache]:
    """What the head would see of the responses' first W positions in a pass over the rows as they are.

    Under block-causal attention the whole suffix runs, and every token sees its own block and earlier ones.

    Args:
        backbone: the model (static).
        params: its parameters.
        cache: the G prefixes.
        rows: the rows.
        deep: the rows' deep prefix KV, or room for them (`room_for_deep`).
        boundary: b, for which the prefixes were encoded.
        block_length: tokens of a block, under block-causal attention.
        width: W (static).
        refresh: whether the pass computes the deep prefix KV; if not, it uses those that there are (static).

    Returns:
        Normalised hidden states, and the deep prefix KV.
    """
    config, (num_rows, length) = backbone.config, rows.tokens.shape
    none = jnp.zeros((0, num_rows, config.num_kv_heads, length, config.head_dim), cache.hidden.dtype)
    suffix = vary_like(SuffixCache(none, none), rows)
    block_ids = None
    if config.block_causal:
        own = jnp.floor_divide(jnp.arange(length) - rows.front[:, None], block_length)
        block_ids = own, own
    over = SuffixForward(
        backbone,
        params,
        cache,
        rows,
        jnp.asarray(clamp_boundary(boundary if deep.k.shape[0] else config.num_layers, config.num_layers)),
        start=jnp.zeros((num_rows,), jnp.int32),
        update=jnp.ones((num_rows, length), bool),
        renew=jnp.ones((num_rows,), bool),
        valid=rows.valid,
        block_ids=block_ids,
    )
    if refresh:
        x, deep, _ = over.refresh(deep, suffix)
    else:
        x, _ = over.reuse(deep, suffix)
    slot = jnp.minimum((rows.front + rows.given)[:, None] + jnp.arange(width), length - 1)
    x = jnp.take_along_axis(x, jnp.take_along_axis(rows.source, slot, axis=1)[..., None], axis=1)
    return backbone.final_norm(params, x), deep
