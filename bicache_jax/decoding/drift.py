"""How far a prefix cache moves a model's predictions, before any of them is decided.

The first pass of a row looks at the same canvas with and without a prefix cache: the prompt, and a response of masks.
So the divergence of its predictions is the cache's doing alone; later canvases also differ by what was decided.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.cache import PrefixCache, Rows
from bicache_jax.core.config import CacheDtype, ModelConfig
from bicache_jax.decoding.encode import encode_alone
from bicache_jax.decoding.looks import look, room_for_deep
from bicache_jax.decoding.tiles import Head, over_tiles
from bicache_jax.sharding import PER_SHARD, REPLICATED, on_shards, param_specs


def divergence(
    x_bwd: Float[Array, "B W D"],
    y_bwd: Float[Array, "B W D"],
    head: Head,
    *,
    config: ModelConfig,
    axis: str | None = None,
) -> Float[Array, "B W"]:
    """Kullback-Leibler divergence of the predictions from `x_bwd` to those from `y_bwd`, in nats.

    Args:
        x_bwd: normalised hidden states.
        y_bwd: others.
        head: rows of the head, their biases and scales.
        config: the architecture.
        axis: mesh axis over which the vocabulary is split; None: it is not.
    """

    def fold(ids: Array, logits: tuple[Array, ...], was: tuple[Array, ...]) -> tuple[Array, ...]:
        a, b = logits
        between = jnp.where(jnp.isneginf(a), 0, a - b)
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
    start: tuple[Array, ...] = (lowest, lowest, zeros, zeros, zeros)
    peak_a, peak_b, sum_a, sum_b, apart = over_tiles(fold, start, (x_bwd, y_bwd), head, config=config, axis=axis)
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
        def first_pass(cache: PrefixCache, rows: Rows) -> Array:
            deep = room_for_deep(config, cache, rows, config.num_layers - 1)
            return look(backbone, params, cache, rows, deep, boundary, block_length, width=width)[0]

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

        plain = first_pass(encoded(ids[:, :0], lengths * 0), whole)
        cached = first_pass(encoded(ids, lengths), rows)
        return divergence(plain, cached, backbone.head(params), config=config, axis=backbone.axis)

    specs = (param_specs(backbone.axes, params), *[PER_SHARD] * 4, REPLICATED, REPLICATED)
    run = on_shards(shard, mesh, specs, PER_SHARD)
    return run(params, prefix_ids, prefix_len, rows, whole, boundary, block_length)
