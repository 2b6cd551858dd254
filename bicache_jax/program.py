"""The decode program of a batch from shapes alone: what the compiler is given before there is anything to decode."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax.backbone import Backbone
from bicache_jax.batch import build_rows
from bicache_jax.buckets import length_bucket, width_bucket
from bicache_jax.cache import PrefixCache
from bicache_jax.grouping import Batch
from bicache_jax.interval import decode, empty_suffix
from bicache_jax.plan import Plan
from bicache_jax.schedule import make_decoding, window_size


def abstract_prefixes(plan: Plan, batch: Batch) -> PrefixCache:
    """Shapes of the batch's prefixes as one cache."""
    config = plan.config
    groups, length, _, _ = plan.shape(batch)
    kv = (plan.buffers.shallow, groups, config.num_kv_heads, length, config.head_dim)

    def zeros() -> PrefixCache:
        return PrefixCache(
            k=jnp.zeros(kv, plan.dtype),
            v=jnp.zeros(kv, plan.dtype),
            hidden=jnp.zeros((1, groups, length, config.d_model), plan.dtype),
            boundaries=jnp.zeros((1,), jnp.int32),
            length=jnp.zeros((groups,), jnp.int32),
        )

    return jax.eval_shape(zeros)


def lower_decode(backbone: Backbone, params: Any, plan: Plan, batch: Batch) -> jax.stages.Lowered:
    """Lowers the program that decodes a batch, as the engine calls it.

    Args:
        backbone: the model.
        params: its parameters, or their shapes (with shardings, for a topology that is not here).
        plan: the run.
        batch: one of its batches.

    Returns:
        The program; `.compile()` gives its memory and its HLO.
    """
    sampling = batch.rows[0].request.sampling
    *_, num_rows, length = plan.shape(batch)
    block_cache = plan.cache.block_cache
    window = window_size(sampling, block_cache, 0)

    def state() -> Any:
        entries = [(row.request, row.sample, row.prefix_len) for row in batch.rows]
        rows = build_rows(
            entries, batch.prefix_index, plan.config, num_rows=num_rows, length=length, guided=batch.guided
        )
        return rows, empty_suffix(plan.config, rows.tokens.shape, plan.dtype, block_cache=block_cache != "off")

    room = length_bucket(sampling.num_steps // sampling.num_blocks)
    decoding = make_decoding(
        plan.config, sampling, batch.boundary, plan.cache.refresh_interval, block_cache=block_cache, room=room
    )
    one = jnp.asarray(1, jnp.int32)
    args = (abstract_prefixes(plan, batch), jax.eval_shape(state), jax.eval_shape(lambda: decoding), one, one)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)), params
    )
    return decode.lower(
        backbone,
        shapes,
        *abstract,
        block_width=width_bucket(sampling.block_size),
        deep_layers=plan.buffers.deep,
        window=min(window and width_bucket(window), length),
        guided=batch.guided,
    )
