"""How parameters are split over the mesh axis `model`.

Heads, MLP columns and vocabulary are split (tensor parallelism, Megatron-LM, arXiv 1909.08053), with one sum after
attention's output projection, one after the MLP, and one for the embedding.

A size that is not a multiple of the number of shards is padded with zero weights. If there are fewer key/value heads
than shards, each head is copied to all shards with query heads that read it (`Partition`). Neither changes the results.

Experts are cut by their width, so that all shards work for every token, or into sets of whole experts, whichever takes
less memory: tiles of TPUs are 128 numbers wide, and an expert of 512 columns on eight shards would fill half of each.
Both end in the same sum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bicache_jax.core.backbone import Path, Table
from bicache_jax.core.config import Experts, ModelConfig
from bicache_jax.core.types import BicacheError
from bicache_jax.sharding.meshes import MODEL

MESH_AXES: Mapping[str | None, str | None] = {
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "expert_mlp": MODEL,
    "shared_mlp": MODEL,
    "expert": None,
    "held_expert": MODEL,
    "expert_width": None,
    "vocab": MODEL,
    "layer": None,
    "width": None,
    None: None,
}
"""Mesh axis of each logical axis; each model has its own table of the logical axes of its parameters."""


LANES, SUBLANES = 128, 8
"""The tile of a TPU's memory: numbers along the last axis of an array, and along the one before it."""


def axes_of(table: Table | None, path: Path, ndim: int) -> tuple[str | None, ...]:
    """Logical axes of a parameter; without a table none of them is ever split.

    Raises:
        ValueError: the parameter is not in the table, has a different rank there, or an axis is unknown.
    """
    if table is None:
        return (None,) * ndim
    name = "/".join(path)
    if path not in table:
        raise ValueError(f"parameter {name} is not in the partition table")
    axes = table[path]
    if len(axes) != ndim:
        raise ValueError(f"parameter {name} has {ndim} axes, the partition table says {axes}")
    if unknown := [axis for axis in axes if axis not in MESH_AXES]:
        known = ", ".join(axis for axis in MESH_AXES if axis)
        raise ValueError(f"parameter {name} has an axis {unknown[0]!r}, known: {known}")
    return axes


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a model's sizes are split into `shards` parts.

    Attributes:
        logical: the architecture of the checkpoint.
        shards: size of the mesh axis `model`.
    """

    logical: ModelConfig
    shards: int

    @functools.cached_property
    def _kv(self) -> tuple[int, int, int]:
        """Number of key/value heads after padding, of copies of each, and of query heads that read one copy."""
        config, shards = self.logical, self.shards
        heads = next(
            k
            for k in range(config.num_kv_heads, 2 * max(shards, config.num_kv_heads))
            if not (k % shards and shards % k)
        )
        copies = max(1, shards // heads)
        return heads, copies, -(-(config.num_heads // config.num_kv_heads) // copies)

    @property
    def config(self) -> ModelConfig:
        """The padded architecture, before it is split."""
        heads, copies, group = self._kv
        return dataclasses.replace(
            self.logical,
            num_heads=heads * copies * group,
            num_kv_heads=heads * copies,
            d_mlp=_up(self.logical.d_mlp, self.shards),
            vocab_size=_up(self.logical.vocab_size, self.shards),
            experts=self._experts(1),
        )

    @functools.cached_property
    def _whole_experts(self) -> bool:
        """Whether shards hold sets of whole experts."""
        experts = self.logical.experts
        if experts is None or self.shards == 1 or experts.num % self.shards:
            return False

        def numbers(held: int, width: int) -> int:
            """Of a layer's three projections, in tiles of memory."""
            d_model = self.logical.d_model
            return held * (2 * _up(d_model, SUBLANES) * _up(width, LANES) + _up(width, SUBLANES) * _up(d_model, LANES))

        sets = numbers(experts.num // self.shards, experts.d_expert)
        return sets < numbers(experts.num, _up(experts.d_expert, self.shards) // self.shards)

    def _experts(self, shards: int) -> Experts | None:
        """The padded mixture of experts, or with `shards` the part of each of them."""
        experts = self.logical.experts
        if experts is None:
            return None
        cut = dataclasses.replace(experts, d_shared=_up(experts.d_shared, self.shards) // shards)
        if self._whole_experts:
            return dataclasses.replace(cut, cut="expert", held=experts.num // shards)
        return dataclasses.replace(cut, d_expert=_up(experts.d_expert, self.shards) // shards)

    @property
    def local(self) -> ModelConfig:
        """The part of the architecture that one shard computes; `vocab_size` is that of the whole model."""
        whole = self.config
        return dataclasses.replace(
            whole,
            num_heads=whole.num_heads // self.shards,
            num_kv_heads=whole.num_kv_heads // self.shards,
            d_mlp=whole.d_mlp // self.shards,
            vocab_size=self.logical.vocab_size,
            experts=self._experts(self.shards),
        )

    def source(self, axis: str | None) -> np.ndarray | None:
        """The source of each index of a padded axis: an index of the checkpoint's axis, or -1 for zeros.

        Args:
            axis: a logical axis; None: one that is never split.

        Returns:
            Indices; None if the axis is the same as in the checkpoint.
        """
        logical, whole = self.logical, self.config
        if axis in ("heads", "kv_heads"):
            heads, copies, group = self._kv
            kv = np.repeat(np.arange(heads), copies)
            kv = np.where(kv < logical.num_kv_heads, kv, -1)
            found, count = kv, logical.num_kv_heads
            if axis == "heads":
                count, per_kv = logical.num_heads, logical.num_heads // logical.num_kv_heads
                within = np.arange(copies)[:, None] * group + np.arange(group)
                within = np.tile(np.where(within < per_kv, within, -1), (heads, 1))
                found = np.where((within < 0) | (kv < 0)[:, None], -1, kv[:, None] * per_kv + within).ravel()
            if np.array_equal(found, np.arange(count)):
                return None
            dims = np.arange(logical.head_dim)
            return np.where(found[:, None] < 0, -1, found[:, None] * logical.head_dim + dims).ravel()
        sizes = {"mlp": (logical.d_mlp, whole.d_mlp), "vocab": (logical.vocab_size, whole.vocab_size)}
        if logical.experts is not None and whole.experts is not None:
            sizes["expert_mlp"] = logical.experts.d_expert, whole.experts.d_expert
            sizes["shared_mlp"] = logical.experts.d_shared, whole.experts.d_shared
        size, padded = sizes.get(axis or "", (0, 0))
        return None if size == padded else np.where(np.arange(padded) < size, np.arange(padded), -1)

    def expand(self, leaf: Any, axes: Sequence[str | None]) -> Any:
        """A checkpoint's parameter, padded to the sizes of `config`; unchanged if it already has them."""
        for index, axis in enumerate(axes):
            source = self.source(axis)
            if source is not None and leaf.shape[index] != len(source):
                shape = [1] * leaf.ndim
                shape[index] = -1
                taken = leaf.take(np.maximum(source, 0), axis=index)
                leaf = taken * (source >= 0).reshape(shape).astype(leaf.dtype)
        return leaf


def param_specs(table: Table | None, params: Any) -> Any:
    """How each parameter is split.

    Args:
        table: logical axes of each parameter, by path (`bicache_jax.core.backbone.Backbone.axes`).
        params: the parameters, or their shapes.

    Returns:
        A tree of `PartitionSpec` like `params`.

    Raises:
        ValueError: as `axes_of`; or a parameter would use a mesh axis twice.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        name = tuple(entry.key for entry in path)
        axes = axes_of(table, name, leaf.ndim)
        cut = [MESH_AXES[axis] for axis in axes]
        used = [axis for axis in cut if axis is not None]
        if len(set(used)) < len(used):
            raise ValueError(f"parameter {'/'.join(name)} would be cut along one mesh axis twice: {axes}")
        return P(*cut)

    return jax.tree_util.tree_map_with_path(spec, params)


def param_shardings(table: Table | None, params: Any, mesh: Mesh) -> Any:
    """`param_specs` as shardings on a mesh.

    Raises:
        BicacheError: the mesh splits models, and parameters without a table cannot be.
    """
    if table is None and mesh.shape[MODEL] > 1:
        raise BicacheError(
            f"mesh: model={mesh.shape[MODEL]} splits parameters, and this architecture does not say how (the axes of"
            " its backbone are None): use a mesh with model=1"
        )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(table, params))


def shard_params(params: Any, table: Table | None, partition: Partition, mesh: Mesh) -> Any:
    """Splits a model that is on one device or on the host; a model that is already on the mesh is not changed."""
    padded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: partition.expand(leaf, axes_of(table, tuple(entry.key for entry in path), leaf.ndim)),
        params,
    )
    return jax.tree.map(jax.device_put, padded, param_shardings(table, padded, mesh))
