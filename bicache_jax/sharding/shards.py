"""How the arrays of the programs lie on a mesh, and how a function is run on every shard of it.

Every program runs under a fully manual `shard_map`, so that its collectives are the ones written down. Over `data`
there are none: a data shard is a batch of its own, with its own prefixes and stop predicates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bicache_jax.core.cache import PrefixCache, SuffixCache
from bicache_jax.sharding.meshes import DATA, MODEL

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
