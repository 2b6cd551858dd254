"""Where the arrays of a run lie: on the default device, or on the shards of a mesh.

Everything that the engine makes for its data shards is a list with one entry a shard; without a mesh there is one. Here
such lists become arrays of the whole mesh, and arrays of the mesh become lists, without a copy and without a look at
what other processes hold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from bicache_jax.core.backbone import Table
from bicache_jax.core.cache import Decoding, PrefixCache, Rows
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.layout import put_rows
from bicache_jax.decoding.interval import State, empty_suffix
from bicache_jax.sharding import DATA, MODEL, PER_SHARD, PREFIX, STATE, Partition, shard_params

Piece = Any
"""One data shard's part of a cache: the cache itself without a mesh, else for each leaf its devices' arrays."""


_SPECS = [getattr(PREFIX, field.name) for field in dataclasses.fields(PrefixCache)]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a run lies.

    Attributes:
        config: the model's architecture.
        mesh: the mesh `("data", "model")`; None: the default device.
    """

    config: ModelConfig
    mesh: Mesh | None = None

    @property
    def partition(self) -> Partition:
        """How the model's sizes are cut."""
        return Partition(self.config, 1 if self.mesh is None else self.mesh.shape[MODEL])

    @property
    def axis(self) -> str | None:
        """The mesh axis that a backbone sums over."""
        return None if self.mesh is None else MODEL

    @property
    def shards(self) -> int:
        """Data shards."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    @property
    def devices(self) -> list[Any]:
        """All devices of the run."""
        return jax.devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)

    @property
    def mine(self) -> list[int]:
        """Data shards of which this process holds a device."""
        if self.mesh is None:
            return [0]
        here = jax.process_index()
        return [i for i, row in enumerate(self.mesh.devices) if any(device.process_index == here for device in row)]

    def params(self, params: Any, table: Table) -> Any:
        """Parameters, cut for the mesh."""
        return params if self.mesh is None else shard_params(params, table, self.partition, self.mesh)

    def _put(self, per_shard: Sequence[np.ndarray]) -> Array:
        """Arrays of the data shards, one after the other."""
        if self.mesh is None:
            return jnp.asarray(per_shard[0])
        whole = np.concatenate(per_shard)
        return jax.make_array_from_callback(
            whole.shape, NamedSharding(self.mesh, PER_SHARD), lambda index: whole[index]
        )

    def vector(self, per_shard: Sequence[int]) -> Array:
        """A number of each data shard."""
        return self._put([np.asarray([number], np.int32) for number in per_shard])

    def tokens(self, per_shard: Sequence[np.ndarray]) -> Array:
        """An integer array of each data shard."""
        return self._put(per_shard)

    def rows(self, per_shard: Sequence[Mapping[str, np.ndarray]]) -> Rows:
        """The rows that `bicache_jax.core.layout.lay_out` laid out for each data shard."""
        joined = {name: [arrays[name] for arrays in per_shard] for name in per_shard[0]}
        return put_rows(joined, self._put)

    def decoding(self, per_shard: Sequence[Decoding]) -> Decoding:
        """What the rows of each data shard share."""
        if self.mesh is None:
            return per_shard[0]
        return jax.tree.map(lambda *leaves: self._put([np.asarray(leaf)[None] for leaf in leaves]), *per_shard)

    def state(self, rows: Rows, dtype: jnp.dtype, *, block_cache: bool) -> State:
        """The rows with room for their block cache."""
        make = functools.partial(empty_suffix, self.partition.config, rows.tokens.shape, dtype, block_cache=block_cache)
        mesh = self.mesh
        if mesh is None:
            return rows, make()
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), STATE[1])
        return rows, jax.jit(make, out_shardings=shardings)()

    def split(self, cache: PrefixCache) -> list[Piece]:
        """A cache of one prefix a data shard as one piece a shard, those of other processes empty."""
        if self.mesh is None:
            return [cache]
        shard_of = {device: i for i, row in enumerate(self.mesh.devices) for device in row}
        leaves, tree = jax.tree.flatten(cache)
        pieces: list[list[list[Array]]] = [[[] for _ in leaves] for _ in range(self.shards)]
        for place, (leaf, spec) in enumerate(zip(leaves, _SPECS, strict=True)):
            shape = NamedSharding(self.mesh, spec).shard_shape(leaf.shape)
            for part in leaf.addressable_shards:
                # Without a prefix there are no elements, and XLA does not cut an array of none.
                pieces[shard_of[part.device]][place].append(part.data if leaf.size else part.data.reshape(shape))
        return [(tree, piece) for piece in pieces]

    def assemble(self, pieces: Sequence[Piece]) -> PrefixCache:
        """The cache that has these pieces; the inverse of `split`."""
        if self.mesh is None:
            return pieces[0]
        mesh, tree = self.mesh, pieces[0][0]
        leaves = []
        for place, spec in enumerate(_SPECS):
            parts = [part for _, piece in pieces for part in piece[place]]
            sizes = [1 if axis is None else mesh.shape[axis] for axis in spec]
            sizes += [1] * (parts[0].ndim - len(sizes))
            shape = tuple(size * times for size, times in zip(parts[0].shape, sizes, strict=True))
            leaves.append(jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, spec), parts))
        return jax.tree.unflatten(tree, leaves)

    def read(self, arrays: Sequence[Array]) -> dict[int, list[np.ndarray]]:
        """What per-row arrays hold, by data shard; shards of other processes are left out."""
        if self.mesh is None:
            return {0: jax.device_get(list(arrays))}
        shard_of = {device: i for i, row in enumerate(self.mesh.devices) for device in row}
        found: dict[int, list[Any]] = {}
        for shard in self.mine:
            found[shard] = [
                next(part.data for part in array.addressable_shards if shard_of[part.device] == shard)
                for array in arrays
            ]
        return jax.device_get(found)
