"""Where the arrays of a run are: on the default device, or on the shards of a mesh.

The engine prepares arrays for its data shards as lists with one entry per shard; without a mesh there is one entry.
This module converts such lists to arrays of the whole mesh and back, without copies and without access to the data of
other processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from bicache_jax.core.backbone import Table
from bicache_jax.core.cache import DecodeState, Decoding, PrefixCache, Rows
from bicache_jax.core.config import CacheDtype, ModelConfig
from bicache_jax.core.kv import dtype_of
from bicache_jax.core.layout import put_rows
from bicache_jax.decoding.interval import begin
from bicache_jax.sharding import DATA, MODEL, PER_SHARD, Partition, prefix_specs, shard_params


@dataclasses.dataclass(frozen=True)
class Piece:
    """One data shard's part of a cache of one prefix.

    Attributes:
        leaves: for each array of the cache, those of the shard's devices that this process holds.
        cache_dtype: how KV are kept, which says what arrays there are (`bicache_jax.sharding.prefix_specs`).
    """

    leaves: tuple[tuple[Any, ...], ...]
    cache_dtype: CacheDtype = "auto"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a run are.

    Attributes:
        config: the model's architecture.
        mesh: the mesh `("data", "model")`; None: the default device.
    """

    config: ModelConfig
    mesh: Mesh | None = None

    @property
    def partition(self) -> Partition:
        """How the model's sizes are split."""
        return Partition(self.config, 1 if self.mesh is None else self.mesh.shape[MODEL])

    @property
    def axis(self) -> str | None:
        """The mesh axis that a backbone sums over."""
        return None if self.mesh is None else MODEL

    @property
    def shards(self) -> int:
        """Number of data shards."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    @property
    def devices(self) -> list[Any]:
        """All devices of the run."""
        return jax.devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)

    @property
    def mine(self) -> list[int]:
        """Data shards with at least one device in this process."""
        if self.mesh is None:
            return [0]
        here = jax.process_index()
        return [i for i, row in enumerate(self.mesh.devices) if any(device.process_index == here for device in row)]

    def _shard_of(self) -> dict[Any, int]:
        """The data shard of each device."""
        assert self.mesh is not None
        return {device: i for i, row in enumerate(self.mesh.devices) for device in row}

    def params(self, params: Any, table: Table | None) -> Any:
        """Parameters, split for the mesh."""
        return params if self.mesh is None else shard_params(params, table, self.partition, self.mesh)

    def put(self, per_shard: Sequence[np.ndarray]) -> Array:
        """One array from the arrays of the data shards, concatenated in order."""
        if self.mesh is None:
            return jnp.asarray(per_shard[0])
        whole = np.concatenate(per_shard)
        return jax.make_array_from_callback(
            whole.shape, NamedSharding(self.mesh, PER_SHARD), lambda index: whole[index]
        )

    def rows(self, per_shard: Sequence[Mapping[str, np.ndarray]]) -> Rows:
        """The rows that `bicache_jax.core.layout.lay_out` laid out for each data shard."""
        joined = {name: [arrays[name] for arrays in per_shard] for name in per_shard[0]}
        return put_rows(joined, self.put)

    def decoding(self, per_shard: Sequence[Decoding]) -> Decoding:
        """The settings of each data shard."""
        if self.mesh is None:
            return per_shard[0]
        return jax.tree.map(lambda *leaves: self.put([np.asarray(leaf)[None] for leaf in leaves]), *per_shard)

    def state(self, rows: Rows, **sizes: Any) -> DecodeState:
        """The state of rows before the first step; `sizes` as in `bicache_jax.decoding.interval.initial_state`."""
        return begin(rows, config=self.partition.local, mesh=self.mesh, **sizes)

    def split(self, cache: PrefixCache) -> list[Piece]:
        """Splits a cache with one prefix per data shard into one piece per shard, empty for other processes."""
        leaves, form = jax.tree.leaves(cache), dtype_of(cache.k)
        if self.mesh is None:
            return [Piece(tuple((leaf,) for leaf in leaves), form)]
        shard_of = self._shard_of()
        pieces: list[list[list[Array]]] = [[[] for _ in leaves] for _ in range(self.shards)]
        for field, (leaf, spec) in enumerate(zip(leaves, jax.tree.leaves(prefix_specs(form)), strict=True)):
            shape = NamedSharding(self.mesh, spec).shard_shape(leaf.shape)
            for part in leaf.addressable_shards:
                # Without a prefix the array is empty, and XLA does not split empty arrays.
                pieces[shard_of[part.device]][field].append(part.data if leaf.size else part.data.reshape(shape))
        return [Piece(tuple(map(tuple, piece)), form) for piece in pieces]

    def assemble(self, pieces: Sequence[Piece]) -> PrefixCache:
        """Builds a cache from its pieces; the inverse of `split`."""
        specs, form = jax.tree.flatten(prefix_specs(pieces[0].cache_dtype))
        if self.mesh is None:
            return jax.tree.unflatten(form, [leaf for (leaf,) in pieces[0].leaves])
        mesh, leaves = self.mesh, []
        for field, spec in enumerate(specs):
            parts = [part for piece in pieces for part in piece.leaves[field]]
            sizes = [1 if axis is None else mesh.shape[axis] for axis in spec]
            sizes += [1] * (parts[0].ndim - len(sizes))
            shape = tuple(size * times for size, times in zip(parts[0].shape, sizes, strict=True))
            leaves.append(jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), parts))
        return jax.tree.unflatten(form, leaves)

    def read(self, arrays: Sequence[Array]) -> dict[int, list[np.ndarray]]:
        """Values of per-row arrays by data shard, without shards of other processes."""
        if self.mesh is None:
            return {0: jax.device_get(list(arrays))}
        shard_of = self._shard_of()
        found: dict[int, list[Any]] = {}
        for shard in self.mine:
            found[shard] = [
                next(part.data for part in array.addressable_shards if shard_of[part.device] == shard)
                for array in arrays
            ]
        return jax.device_get(found)
