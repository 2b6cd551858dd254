"""Meshes `("data", "model")`, and how the arrays of the programs lie on them.

Every program runs under a fully manual `shard_map`, so that its collectives are the ones written down. Over `data`
there are none: a data shard is a batch of its own, with its own prefixes and stop predicates. Over `model` heads, MLP
columns and vocabulary are split (tensor parallelism, Megatron-LM, arXiv 1909.08053), with one sum after attention's
output projection, one after the MLP, and one for the embedding.

A size that the shards do not divide is padded with zero weights, and key/value heads fewer than the shards are held by
all shards whose query heads read them (`Layout`). Both leave results as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bicache_jax.cache import PrefixCache, SuffixCache
from bicache_jax.config import ModelConfig
from bicache_jax.types import BicacheError

DATA, MODEL = "data", "model"

RULES: Mapping[str | None, str | None] = {
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "vocab": MODEL,
    "layer": None,
    "width": None,
}
"""Mesh axis of each logical axis of a parameter; which logical axes a parameter has is its model's own table."""

Path = tuple[str, ...]
Table = Mapping[Path, tuple[str, ...]]


def make_mesh(spec: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh from its description.

    Args:
        spec: `data=4,model=2`; an axis left out has size 1.
        devices: devices to use; None: all of this job, or the first ones of a single process if fewer are needed.

    Returns:
        The mesh, axes `("data", "model")`.

    Raises:
        BicacheError: the description cannot be read, or asks for more devices than there are.
    """
    sizes = {DATA: 1, MODEL: 1}
    seen = set()
    for part in spec.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if found is None or found[1] not in sizes or found[1] in seen:
            raise BicacheError(f"--mesh {spec}: expected data=INT,model=INT with sizes of 1 or more")
        seen.add(found[1])
        sizes[found[1]] = int(found[2])
    wanted = math.prod(sizes.values())
    have = list(jax.devices() if devices is None else devices)
    if wanted > len(have):
        raise BicacheError(f"--mesh {spec}: needs {wanted} devices, there are {len(have)}")
    if devices is None and wanted < len(have) and jax.process_count() > 1:
        raise BicacheError(f"--mesh {spec}: a job of several processes must use all of its {len(have)} devices")
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=have[:wanted],
    )


def check_mesh(mesh: Mesh) -> Mesh:
    """The mesh itself, if it is one that engines run on.

    Raises:
        BicacheError: its axes are not `("data", "model")`.
    """
    if tuple(mesh.axis_names) != (DATA, MODEL):
        raise BicacheError(f"mesh: axes must be ('data', 'model'), got {tuple(mesh.axis_names)}; see make_mesh")
    return mesh


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model's sizes are cut into `shards` parts.

    Attributes:
        logical: the architecture as the checkpoint has it.
        shards: size of the mesh axis `model`.
    """

    logical: ModelConfig
    shards: int

    @functools.cached_property
    def _kv(self) -> tuple[int, int, int]:
        """Key/value heads after padding, copies of each, and query heads that read one copy."""
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
        """The architecture whose parameters are cut: the logical one, padded."""
        heads, copies, group = self._kv
        return dataclasses.replace(
            self.logical,
            num_heads=heads * copies * group,
            num_kv_heads=heads * copies,
            d_mlp=_up(self.logical.d_mlp, self.shards),
            vocab_size=_up(self.logical.vocab_size, self.shards),
        )

    @property
    def local(self) -> ModelConfig:
        """What one shard computes. Its vocabulary counts the tokens of the whole model."""
        whole = self.config
        return dataclasses.replace(
            whole,
            num_heads=whole.num_heads // self.shards,
            num_kv_heads=whole.num_kv_heads // self.shards,
            d_mlp=whole.d_mlp // self.shards,
            vocab_size=self.logical.vocab_size,
        )

    def source(self, axis: str) -> np.ndarray | None:
        """Where each index of a cut axis comes from: an index of the checkpoint's axis, or -1 for zeros.

        Args:
            axis: a logical axis.

        Returns:
            Indices; None where the axis is as the checkpoint has it.
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
        size, padded = {
            "mlp": (logical.d_mlp, whole.d_mlp),
            "vocab": (logical.vocab_size, whole.vocab_size),
        }.get(axis, (0, 0))
        return None if size == padded else np.where(np.arange(padded) < size, np.arange(padded), -1)

    def expand(self, leaf: Any, axes: Sequence[str]) -> Any:
        """A checkpoint's parameter with the sizes of `config`; one that has them already stays as it is."""
        for place, axis in enumerate(axes):
            source = self.source(axis)
            if source is not None and leaf.shape[place] != len(source):
                shape = [1] * leaf.ndim
                shape[place] = -1
                taken = leaf.take(np.maximum(source, 0), axis=place)
                leaf = taken * (source >= 0).reshape(shape).astype(leaf.dtype)
        return leaf


def param_specs(table: Table, params: Any) -> Any:
    """How each parameter is cut.

    Args:
        table: logical axes of each parameter, by path (`bicache_jax.models.transformer.AXES`).
        params: the parameters, or their shapes.

    Returns:
        A tree of `PartitionSpec` like `params`.

    Raises:
        ValueError: a parameter is not in the table, has another rank there, or would use a mesh axis twice.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        name = tuple(entry.key for entry in path)
        if name not in table:
            raise ValueError(f"parameter {'/'.join(name)} is not in the partition table")
        axes = table[name]
        if len(axes) != leaf.ndim:
            raise ValueError(f"parameter {'/'.join(name)} has {leaf.ndim} axes, the partition table says {axes}")
        cut = [RULES[axis] for axis in axes]
        used = [axis for axis in cut if axis is not None]
        if len(set(used)) < len(used):
            raise ValueError(f"parameter {'/'.join(name)} would be cut along one mesh axis twice: {axes}")
        return P(*cut)

    return jax.tree_util.tree_map_with_path(spec, params)


def param_shardings(table: Table, params: Any, mesh: Mesh) -> Any:
    """`param_specs` as shardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(table, params))


def shard_params(params: Any, table: Table, layout: Layout, mesh: Mesh) -> Any:
    """Cuts a model that lies on one device or on the host; one that was loaded onto the mesh stays as it is."""
    padded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: layout.expand(leaf, table[tuple(entry.key for entry in path)]), params
    )
    return jax.tree.map(jax.device_put, padded, param_shardings(table, padded, mesh))


PER_SHARD, REPLICATED = P(DATA), P()
_CUT = {"k": P(None, DATA, MODEL), "v": P(None, DATA, MODEL), "hidden": P(None, DATA)}


def _cut(kind: type[Any]) -> Any:
    """A cache type with, for each field, how it is cut: rows and prefixes along `data`, their heads along `model`."""
    tree = object.__new__(kind)
    for field in dataclasses.fields(kind):
        object.__setattr__(tree, field.name, _CUT.get(field.name, PER_SHARD))
    return tree


PREFIX = _cut(PrefixCache)
STATE = (PER_SHARD, _cut(SuffixCache))


def on_shards(function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function as each device of the mesh runs it on its part; as it is where there is no mesh."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def psum(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over a mesh axis; `x` itself where there is none."""
    return x if axis is None else jax.lax.psum(x, axis)
