"""The arguments of the two programs, put together once: for the engine that calls them, and for what lowers them.

A call is made of what each data shard brings, on the host, and of static sizes. `lower_encode` and `lower_decode` give
the compiler the shapes of the very same arguments, before there is anything to run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.core.buckets import length_bucket, width_bucket
from bicache_jax.core.cache import Decoding
from bicache_jax.core.config import CACHED_BLOCK, SamplingConfig
from bicache_jax.core.layout import lay_out, put_rows
from bicache_jax.decoding.encode import encode
from bicache_jax.decoding.interval import NO_LIMIT, decode, initial_state
from bicache_jax.decoding.places import no_prefixes
from bicache_jax.decoding.schedule import Stage, make_decoding, pass_sizes, stages
from bicache_jax.serving.grouping import Batch, Row
from bicache_jax.serving.placement import Piece
from bicache_jax.serving.plan import Plan
from bicache_jax.sharding import PER_SHARD, PREFIX, REPLICATED, STATE


@dataclasses.dataclass(frozen=True)
class EncodeCall:
    """One prefix encoded on every data shard.

    Attributes:
        plan: the run.
        prefixes: the prefix of each data shard; None where a shard has nothing to encode.
        boundaries: boundaries in use of each of them.
        length: P, to which all are padded.
        block_length: tokens of a block, under block-causal attention.
        before: an encoding of the first blocks of the prefix, and how many tokens these are; with one data shard.
    """

    plan: Plan
    prefixes: Sequence[tuple[int, ...] | None]
    boundaries: Sequence[Sequence[int]]
    length: int
    block_length: int = CACHED_BLOCK
    before: Piece | None = None
    begun: int = 0

    @property
    def sizes(self) -> dict[str, Any]:
        """Static arguments."""
        plan = self.plan
        return {
            "num_layers": plan.buffers.shallow,
            "length": None if self.before is None else self.length,
            "cache_dtype": plan.cache.cache_dtype,
        }

    def shard(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prefix ids [1, P], prefix length [1] and boundary slots [J] of a data shard."""
        prefix, used = self.prefixes[number] or (), self.boundaries[number]
        rest = prefix[self.begun :]
        ids = np.zeros((1, self.length if self.before is None else self.plan.prefix_bucket(len(rest))), np.int32)
        ids[0, : len(rest)] = rest
        slots = np.full(self.plan.buffers.slots, self.plan.config.num_layers, np.int32)
        slots[: len(used)] = used
        return ids, np.asarray([len(prefix)], np.int32), slots


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """Rows decoded, a batch on every data shard.

    Attributes:
        plan: the run.
        shape: (G, P, B, U) in buckets, of each batch.
        sampling: settings that stand for all rows' where these agree: lengths, blocks and steps by bucket.
    """

    plan: Plan
    shape: tuple[int, int, int, int]
    sampling: SamplingConfig

    @classmethod
    def of(cls, plan: Plan, *batches: Batch) -> DecodeCall:
        """The call of a planned round, or of one of its batches."""
        first = next(batch for batch in batches if batch.rows).rows[0]
        return cls(plan, plan.shape(*batches), first.request.sampling)

    @property
    def stages(self) -> list[Stage]:
        """The programs that rows go through, by the block that they have reached."""
        found = stages(self.sampling, self.plan.cache.block_cache)
        return found if found[0].span else [Stage(0, NO_LIMIT)]

    def sizes(self, stage: Stage) -> dict[str, Any]:
        """Static arguments of a dispatch."""
        *_, length = self.shape
        config, sampling = self.plan.config, self.sampling
        exact = config.block_causal and stage.span > 0  # its blocks are small, and no other length shares the program
        return {
            "block_width": sampling.block_size if exact else width_bucket(sampling.block_size),
            "sizes": pass_sizes(config, sampling, stage.span and width_bucket(stage.span), length),
            "guided": sampling.guided,
        }

    @property
    def copies(self) -> int:
        """Places that a row takes: two where it has a twin."""
        return 1 + self.sampling.guided

    def rows(self, rows: Sequence[Row | None], prefix_index: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows of a data shard; `prefix_index` is that of the rows, then that of their twins."""
        *_, num_rows, length = self.shape
        return lay_out(
            [None if row is None else (row.request, row.sample, row.prefix_len) for row in rows],
            prefix_index,
            self.plan.config,
            num_rows=num_rows,
            length=length,
            guided=self.sampling.guided,
        )

    def decoding(self, row: Row | None) -> Decoding:
        """What the rows of a data shard share, from one of them."""
        sampling = self.sampling if row is None else row.request.sampling
        return make_decoding(
            self.plan.config,
            sampling,
            0 if row is None else row.boundary,
            self.plan.cache.interval(sampling),
            block_cache=self.plan.cache.block_cache,
            num_counts=length_bucket(sampling.block_steps),
        )

    @property
    def state_sizes(self) -> dict[str, Any]:
        """What sizes the state in front of the first step."""
        return {
            "dtype": self.plan.dtype,
            "prefix_len": self.shape[1],
            "deep_layers": self.plan.buffers.deep,
            "block_cache": self.plan.cache.block_cache != "off",
            "cache_dtype": self.plan.cache.cache_dtype,
        }

    @property
    def prefix_sizes(self) -> dict[str, Any]:
        """What sizes the cache of the batch's prefixes."""
        groups, length, _, _ = self.shape
        return {
            "groups": groups,
            "length": length,
            "layers": self.plan.buffers.shallow,
            "dtype": self.plan.dtype,
            "cache_dtype": self.plan.cache.cache_dtype,
        }


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


def _shapes(params: Params) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)), params
    )


def lower_encode(
    backbone: Backbone, params: Params, plan: Plan, *batches: Batch, mesh: Mesh | None = None
) -> jax.stages.Lowered:
    """Lowers the program that encodes a prefix on every data shard; arguments as `lower_decode`."""
    _, length, _, _ = plan.shape(*batches)
    call = EncodeCall(plan, [()], [()], length)
    args = _everywhere(jax.eval_shape(lambda: tuple(map(jnp.asarray, call.shard(0)))), (PER_SHARD,) * 3, mesh)
    block = jax.ShapeDtypeStruct((), jnp.int32)
    return encode.lower(backbone, _shapes(params), *args, block, mesh=mesh, **call.sizes)


def lower_decode(
    backbone: Backbone, params: Params, plan: Plan, *batches: Batch, mesh: Mesh | None = None
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
    call = DecodeCall.of(plan, *batches)
    batch = next(batch for batch in batches if batch.rows)

    def arguments() -> tuple[Any, ...]:
        decoding, limit = call.decoding(batch.rows[0]), jnp.asarray(1, jnp.int32)
        if mesh is not None:
            decoding = jax.tree.map(lambda leaf: leaf[None], decoding)
        rows = put_rows(call.rows(batch.rows, batch.prefix_index), jnp.asarray)
        state = initial_state(backbone.config, rows, **call.state_sizes)
        return no_prefixes(backbone.config, **call.prefix_sizes), state, decoding, limit, limit, limit[None]

    specs = (PREFIX, STATE, PER_SHARD, REPLICATED, REPLICATED, PER_SHARD)
    args = _everywhere(jax.eval_shape(arguments), specs, mesh)
    return decode.lower(backbone, _shapes(params), *args, mesh=mesh, **call.sizes(call.stages[0]))
