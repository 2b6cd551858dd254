"""How far a prefix cache moves a model's predictions, before any of them is decided.

The first pass of a row looks at the same canvas with and without a prefix cache: the prompt, and a response of masks.
So the divergence of its predictions is the cache's doing alone; later canvases also differ by what was decided.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from bicache_jax.core.axes import vary_like
from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.cache import DeepCache, PrefixCache, Rows, SuffixCache
from bicache_jax.core.config import CacheDtype, ModelConfig
from bicache_jax.core.kv import dtype_of, zeros
from bicache_jax.core.quantized import product
from bicache_jax.decoding.encode import encode_alone
from bicache_jax.decoding.forward import SuffixForward
from bicache_jax.decoding.head import TILE
from bicache_jax.sharding import PER_SHARD, REPLICATED, on_shards, param_specs


def first_pass(
    backbone: Backbone,
    params: Params,
    cache: PrefixCache,
    rows: Rows,
    boundary: Int[Array, ""],
    block_length: Int[Array, ""],
    *,
    width: int,
) -> Float[Array, "B W D"]:
    """What the head would see of the responses' first W positions in the rows' first pass, a refresh.

    Args:
        backbone: the model (static).
        params: its parameters.
        cache: the G prefixes.
        rows: rows at step 0.
        boundary: b, for which the prefixes were encoded.
        block_length: tokens of a block, under block-causal attention.
        width: W (static).

    Returns:
        Normalised hidden states.
    """
    config, (num_rows, length) = backbone.config, rows.tokens.shape
    heads = (num_rows, config.num_kv_heads)
    layers = 0 if config.block_causal or not cache.k.shape[-2] else config.num_layers - 1
    dtype = cache.hidden.dtype
    deep = zeros((layers, *heads, cache.k.shape[-2], config.head_dim), dtype, dtype_of(cache.k))
    none = jnp.zeros((0, *heads, length, config.head_dim), dtype)
    block_ids = None
    if config.block_causal:
        own = jnp.floor_divide(jnp.arange(length) - rows.front[:, None], block_length)
        block_ids = own, own
    over = SuffixForward(
        backbone,
        params,
        cache,
        rows,
        jnp.asarray(clamp_boundary(boundary if layers else config.num_layers, config.num_layers)),
        start=jnp.zeros((num_rows,), jnp.int32),
        update=jnp.ones((num_rows, length), bool),
        renew=jnp.ones((num_rows,), bool),
        valid=rows.valid,
        block_ids=block_ids,
    )
    x, _, _ = over.refresh(*vary_like((DeepCache(deep, deep), SuffixCache(none, none)), rows))
    slot = jnp.minimum((rows.front + rows.given)[:, None] + jnp.arange(width), length - 1)
    x = jnp.take_along_axis(x, jnp.take_along_axis(rows.source, slot, axis=1)[..., None], axis=1)
    return backbone.final_norm(params, x)


def divergence(
    x_bwd: Float[Array, "B W D"],
    y_bwd: Float[Array, "B W D"],
    head: tuple[Shaped[Array, "V D"], Float[Array, " V"] | None, Float[Array, " V"] | None],
    *,
    config: ModelConfig,
    axis: str | None = None,
) -> Float[Array, "B W"]:
    """Kullback-Leibler divergence of the predictions from `x_bwd` to those from `y_bwd`, in nats.

    Logits exist for one tile of the vocabulary at a time.

    Args:
        x_bwd: normalised hidden states.
        y_bwd: others.
        head: rows of the head, their biases and scales, as `Backbone.head` gives them.
        config: the architecture.
        axis: mesh axis over which the vocabulary is split; None: it is not.
    """
    head_vd, bias_v, scale_v = head
    num_rows = head_vd.shape[0]
    tile = min(TILE, num_rows)
    first = 0 if axis is None else jax.lax.axis_index(axis) * num_rows

    def logits(hidden: Array, start: Array) -> Array:
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=tile)
        scale = None if scale_v is None else part(scale_v)
        found = product(hidden, part(head_vd), scale, out_first=True, quantize=config.quantize, dtype=jnp.float32)
        return found if bias_v is None else found + part(bias_v).astype(jnp.float32)

    def of_tile(index: Array, was: tuple[Array, ...]) -> tuple[Array, ...]:
        start = jnp.minimum(index * tile, num_rows - tile)  # the last tile overlaps the one before it
        ids = start + jnp.arange(tile)
        counts = (ids >= index * tile) & (first + ids < config.vocab_size)
        a, b = (jnp.where(counts, logits(hidden, start), -jnp.inf) for hidden in (x_bwd, y_bwd))
        between = jnp.where(counts, a - b, 0)
        peak_a, peak_b, sum_a, sum_b, apart = was
        top_a, top_b = (jnp.maximum(peak, jnp.max(new, -1)) for peak, new in ((peak_a, a), (peak_b, b)))
        shrink, weights = jnp.exp(peak_a - top_a), jnp.exp(a - top_a[..., None])
        return (
            top_a,
            top_b,
            shrink * sum_a + jnp.sum(weights, -1),
            jnp.exp(peak_b - top_b) * sum_b + jnp.sum(jnp.exp(b - top_b[..., None]), -1),
            shrink * apart + jnp.sum(weights * between, -1),
        )

    lowest, zeros = jnp.full(x_bwd.shape[:2], jnp.finfo(jnp.float32).min), jnp.zeros(x_bwd.shape[:2])
    start = vary_like((lowest, lowest, zeros, zeros, zeros), x_bwd)
    peak_a, peak_b, sum_a, sum_b, apart = jax.lax.fori_loop(0, -(-num_rows // tile), of_tile, start)
    if axis is not None:
        top_a, top_b = jax.lax.pmax((peak_a, peak_b), axis)
        mine_a, mine_b = jnp.exp(peak_a - top_a), jnp.exp(peak_b - top_b)
        sum_a, sum_b, apart = jax.lax.psum((mine_a * sum_a, mine_b * sum_b, mine_a * apart), axis)
        peak_a, peak_b = top_a, top_b
    found = apart / sum_a - (peak_a + jnp.log(sum_a)) + (peak_b + jnp.log(sum_b))
    return jnp.maximum(found, 0)  # rounding


@functools.partial(jax.jit, static_argnames=("backbone", "width", "cache_dtype", "mesh"))
def drift(
    backbone: Backbone,
    params: Params,
    prefix_ids: Int[Array, "G P"],
    prefix_len: Int[Array, " G"],
    rows: Rows,
    whole: Rows,
    boundary: Int[Array, ""],
    block_length: Int[Array, ""],
    *,
    width: int,
    cache_dtype: CacheDtype = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "B W"]:
    """Divergence of the first pass without a prefix cache to the one with it, position by position.

    Args:
        backbone: the model, or one device's part of it (static).
        params: its parameters.
        prefix_ids: the prefixes, padded to P.
        prefix_len: tokens of each.
        rows: the rows over them, at step 0.
        whole: the same rows with the whole prompt in the suffix.
        boundary: b.
        block_length: tokens of a block, under block-causal attention.
        width: W, response positions (static).
        cache_dtype: how the KV of prefixes are kept (static).
        mesh: the mesh, whose data shards have rows and prefixes of their own; None: one device.

    Returns:
        Nats.
    """
    config = backbone.config

    def shard(
        params: Params,
        ids: Array,
        lengths: Array,
        rows: Rows,
        whole: Rows,
        boundary: Array,
        block_length: Array,
    ) -> Array:
        look = functools.partial(first_pass, backbone, params, block_length=block_length, width=width)
        slots = jnp.asarray(clamp_boundary(boundary, config.num_layers))[None]

        def encoded(ids: Array, lengths: Array) -> PrefixCache:
            return encode_alone(
                backbone,
                params,
                ids,
                lengths,
                slots,
                block_length,
                num_layers=config.num_layers,
                cache_dtype=cache_dtype,
            )

        plain = look(encoded(ids[:, :0], lengths * 0), whole, boundary)
        cached = look(encoded(ids, lengths), rows, boundary)
        return divergence(plain, cached, backbone.head(params), config=config, axis=backbone.axis)

    specs = (param_specs(backbone.axes, params), *[PER_SHARD] * 4, REPLICATED, REPLICATED)
    run = on_shards(shard, mesh, specs, PER_SHARD)
    return run(params, prefix_ids, prefix_len, rows, whole, boundary, block_length)
