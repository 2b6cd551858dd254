"""The programs of a round from shapes alone: what the compiler is given before there is anything to run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bicache_jax.core.backbone import Backbone
from bicache_jax.core.buckets import length_bucket, width_bucket
from bicache_jax.core.cache import PrefixCache
from bicache_jax.core.layout import build_rows
from bicache_jax.decoding.encode import encode
from bicache_jax.decoding.interval import decode, empty_suffix
from bicache_jax.decoding.schedule import make_decoding, window_size
from bicache_jax.serving.grouping import Batch
from bicache_jax.serving.plan import Plan
from bicache_jax.sharding import PER_SHARD, PREFIX, REPLICATED, STATE


def _everywhere(local: Any, specs: Any, mesh: Mesh | None) -> Any:
    """Shapes of whole arrays from those of one device's part."""

    def whole(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        times = [1 if axis is None else mesh.shape[axis] for axis in spec] + [1] * (leaf.ndim - len(spec))
        shape = tuple(size * by for size, by in zip(leaf.shape, times, strict=True))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    is_spec = lambda node: isinstance(node, P)  # noqa: E731
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda leaf: whole(leaf, spec), part), specs, local, is_leaf=is_spec
    )


def _shapes(params: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)), params
    )


def abstract_prefixes(backbone: Backbone, plan: Plan, *batches: Batch) -> PrefixCache:
    """Shapes of one shard's prefixes as one cache."""
    config = backbone.config
    groups, length, _, _ = plan.shape(*batches)
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


def lower_encode(backbone: Backbone, params: Any, plan: Plan, *batches: Batch, mesh: Mesh | None = None) -> Any:
    """Lowers the program that encodes a prefix on every data shard; arguments as `lower_decode`."""
    _, length, _, _ = plan.shape(*batches)

    def arguments() -> Any:
        one = jnp.zeros((1,), jnp.int32)
        return jnp.zeros((1, length), jnp.int32), one, jnp.zeros((plan.buffers.slots,), jnp.int32)

    args = _everywhere(jax.eval_shape(arguments), (PER_SHARD,) * 3, mesh)
    return encode.lower(backbone, _shapes(params), *args, num_layers=plan.buffers.shallow, mesh=mesh)


def lower_decode(
    backbone: Backbone, params: Any, plan: Plan, *batches: Batch, mesh: Mesh | None = None
) -> jax.stages.Lowered:
    """Lowers the program that decodes a round, as the engine calls it.

    Args:
        backbone: the model, or one shard's part of it.
        params: its parameters, or their shapes (with shardings, for a topology that is not here).
        plan: the run.
        *batches: one of its rounds, or one of its batches.
        mesh: the mesh; None: one device.

    Returns:
        The program; `.compile()` gives its memory and its HLO.
    """
    batch = next(batch for batch in batches if batch.rows)
    sampling = batch.rows[0].request.sampling
    *_, num_rows, length = plan.shape(*batches)
    block_cache = plan.cache.block_cache
    window = window_size(sampling, block_cache, 0)

    def state() -> Any:
        entries = [(row.request, row.sample, row.prefix_len) for row in batch.rows]
        rows = build_rows(
            entries, batch.prefix_index, plan.config, num_rows=num_rows, length=length, guided=batch.guided
        )
        return rows, empty_suffix(backbone.config, rows.tokens.shape, plan.dtype, block_cache=block_cache != "off")

    room = length_bucket(sampling.num_steps // sampling.num_blocks)

    def decoding() -> Any:
        values = make_decoding(
            plan.config, sampling, batch.boundary, plan.cache.interval(sampling), block_cache=block_cache, room=room
        )
        return values if mesh is None else jax.tree.map(lambda leaf: leaf[None], values)

    one = jax.eval_shape(lambda: jnp.asarray(1, jnp.int32))
    local = (abstract_prefixes(backbone, plan, *batches), jax.eval_shape(state), jax.eval_shape(decoding), one, one)
    args = _everywhere(local, (PREFIX, STATE, PER_SHARD, REPLICATED, REPLICATED), mesh)
    return decode.lower(
        backbone,
        _shapes(params),
        *args,
        block_width=width_bucket(sampling.block_size),
        deep_layers=plan.buffers.deep,
        window=min(window and width_bucket(window), length),
        guided=batch.guided,
        mesh=mesh,
    )
