"""Small programs between dispatches: prefixes and rows take places in a batch, and the host sees how its rows stand.

A batch keeps its shape while rows come and go. All places are traced, and what is written is donated, so that a row
that joins neither compiles nor copies anything.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from bicache_jax.core.cache import DecodeState, PrefixCache, Rows
from bicache_jax.core.config import CacheDtype, ModelConfig
from bicache_jax.core.kv import KV, zeros
from bicache_jax.sharding import DATA, PER_SHARD, PREFIX, REPLICATED, STATE, on_shards

COUNTS = ("done", "failed", "step", "block", "forward_passes")
"""What `look` shows of every row."""
KEPT = ("deep", "suffix")
"""What a batch keeps for every row beside the row itself."""
BY_GROUP = ("k", "v", "hidden")
"""What a cache of G prefixes has for each of them along its second axis."""


class Look(NamedTuple):
    """How a batch stands.

    Attributes:
        counts: the fields `COUNTS` of the rows of all data shards.
        passes: passes made by each data shard.
        tokens: the suffixes, each shard's where it is.
    """

    counts: Int[Array, "C B"]
    passes: Int[Array, " S"]
    tokens: Int[Array, "B U"]


@functools.partial(
    jax.jit, static_argnames=("config", "groups", "length", "layers", "slots", "dtype", "cache_dtype", "mesh")
)
def no_prefixes(
    config: ModelConfig,
    *,
    groups: int,
    length: int,
    layers: int,
    slots: int = 1,
    dtype: jnp.dtype,
    cache_dtype: CacheDtype = "auto",
    mesh: Mesh | None = None,
) -> PrefixCache:
    """Room for prefixes on every data shard, all of length 0.

    Args:
        config: a device's part of the architecture.
        groups: G.
        length: P.
        layers: layers of KV.
        slots: boundaries whose hidden states there is room for.
        dtype: of hidden states, and of KV if `cache_dtype` is `auto`.
        cache_dtype: how KV are kept.
        mesh: the mesh; None: one device.
    """

    def make() -> PrefixCache:
        kv = (layers, groups, config.num_kv_heads, length, config.head_dim)
        return PrefixCache(
            k=zeros(kv, dtype, cache_dtype),
            v=zeros(kv, dtype, cache_dtype),
            hidden=jnp.zeros((slots, groups, length, config.d_model), dtype),
            boundaries=jnp.zeros((slots,), jnp.int32),
            length=jnp.zeros((groups,), jnp.int32),
        )

    return on_shards(make, mesh, (), PREFIX)()


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("cache",))
def put_prefix(
    cache: PrefixCache,
    prefix: PrefixCache,
    place: Int[Array, " S"],
    boundary: Int[Array, " S"],
    *,
    mesh: Mesh | None = None,
) -> PrefixCache:
    """Writes a prefix into a batch's cache, with the hidden states before one boundary; on each data shard its own.

    Args:
        cache: G prefixes (donated).
        prefix: one prefix.
        place: which of the G it becomes; negative: none.
        boundary: the boundary of the batch.
        mesh: the mesh that holds them; None: one device.

    Returns:
        The cache.
    """

    def put(cache: PrefixCache, one: PrefixCache, place: Array, boundary: Array) -> PrefixCache:
        wanted, at = place[0] >= 0, jnp.maximum(place[0], 0)

        def into(stack: Array, fresh: Array, axis: int) -> Array:
            old = jax.lax.dynamic_slice_in_dim(stack, at, 1, axis)
            return jax.lax.dynamic_update_slice_in_dim(stack, jnp.where(wanted, fresh, old), at, axis)

        def kv(stack: KV, fresh: KV) -> KV:
            return jax.tree.map(functools.partial(into, axis=1), stack, fresh)

        return PrefixCache(
            k=kv(cache.k, one.k),
            v=kv(cache.v, one.v),
            hidden=into(cache.hidden, one.hidden_at(boundary[0])[None], 1),
            boundaries=jnp.where(wanted, boundary, cache.boundaries),
            length=into(cache.length, one.length, 0),
        )

    return on_shards(put, mesh, (PREFIX, PREFIX, PER_SHARD, PER_SHARD), PREFIX)(cache, prefix, place, boundary)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("state",))
def seat(state: DecodeState, rows: Rows, taken: Bool[Array, " B"], *, mesh: Mesh | None = None) -> DecodeState:
    """Puts rows into places of a batch.

    Args:
        state: the batch (donated).
        rows: rows at step 0, or padding, for the places that change.
        taken: these places.
        mesh: the mesh that holds them; None: one device.
    """

    def put(state: DecodeState, rows: Rows, taken: Array) -> DecodeState:
        def one(new: Array, old: Array) -> Array:
            return jnp.where(taken.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        return dataclasses.replace(state, rows=jax.tree.map(one, rows, state.rows))

    return on_shards(put, mesh, (STATE, PER_SHARD, PER_SHARD), STATE)(state, rows, taken)


@functools.partial(jax.jit, static_argnames=("mesh",))
def move_rows(state: DecodeState, source: Int[Array, " C"], *, mesh: Mesh | None = None) -> DecodeState:
    """The same rows in a batch of another size.

    Args:
        state: the batch.
        source: for each place of the new batch the old one, -1 for padding; on a mesh, of each data shard.
        mesh: the mesh that holds them; None: one device.
    """

    def move(state: DecodeState, source: Array) -> DecodeState:
        def take(array: Array, axis: int = 0) -> Array:
            return jnp.take(array, jnp.maximum(source, 0), axis=axis)

        rows = jax.tree.map(take, state.rows)
        caches = {name: jax.tree.map(functools.partial(take, axis=1), getattr(state, name)) for name in KEPT}
        return dataclasses.replace(state, rows=dataclasses.replace(rows, done=rows.done | (source < 0)), **caches)

    return on_shards(move, mesh, (STATE, PER_SHARD), STATE)(state, source)


@functools.partial(jax.jit, static_argnames=("groups", "mesh"))
def more_prefixes(cache: PrefixCache, *, groups: int, mesh: Mesh | None = None) -> PrefixCache:
    """The same prefixes in a cache with more places, `groups` in all."""

    def grow(cache: PrefixCache) -> PrefixCache:
        def pad(array: Array, axis: int) -> Array:
            more = [(0, groups - array.shape[axis] if at == axis else 0) for at in range(array.ndim)]
            return jnp.pad(array, more)

        by_group = {name: jax.tree.map(functools.partial(pad, axis=1), getattr(cache, name)) for name in BY_GROUP}
        return dataclasses.replace(cache, length=pad(cache.length, 0), **by_group)

    return on_shards(grow, mesh, (PREFIX,), PREFIX)(cache)


@functools.partial(jax.jit, static_argnames=("mesh",))
def look(state: DecodeState, *, mesh: Mesh | None = None) -> Look:
    """Copies what the host reads, so that the next dispatch may take the state; counts go to every process."""

    def copy(state: DecodeState) -> Look:
        counts = jnp.stack([getattr(state.rows, name).astype(jnp.int32) for name in COUNTS])
        passes, tokens = jnp.copy(state.passes), jnp.copy(state.rows.tokens)
        if mesh is not None:
            counts, passes = (jax.lax.all_gather(x, DATA, axis=x.ndim - 1, tiled=True) for x in (counts, passes))
        return Look(counts, passes, tokens)

    return on_shards(copy, mesh, (STATE,), Look(REPLICATED, REPLICATED, PER_SHARD))(state)  # type: ignore[arg-type]
