"""How the programs' arrays are placed on a mesh, and how a function runs on every shard of it.

Every program runs under a fully manual `shard_map`, so that its only collectives are those in the code. There are none
over `data`: each data shard is a separate batch with its own prefixes and stop conditions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bicache_jax.core.cache import DecodeState, DeepCache, PrefixCache, SuffixCache
from bicache_jax.core.config import CacheDtype
from bicache_jax.core.kv import Quantized
from bicache_jax.sharding.meshes import DATA, MODEL

PER_SHARD, REPLICATED = P(DATA), P()
_KV: Any = P(None, DATA, MODEL)  # rows and prefixes along `data`, their heads along `model`
_EACH: Any = PER_SHARD

PREFIX = PrefixCache(k=_KV, v=_KV, hidden=P(None, DATA), boundaries=_EACH, length=_EACH)  # type: ignore[arg-type]
STATE = DecodeState(rows=_EACH, deep=DeepCache(_KV, _KV), suffix=SuffixCache(_KV, _KV), waited=_EACH, passes=_EACH)


def prefix_specs(cache_dtype: CacheDtype) -> PrefixCache:
    """`PREFIX` with an entry for each array of a cache of this form."""
    kv = Quantized(_KV, _KV) if cache_dtype == "int8" else _KV
    return dataclasses.replace(PREFIX, k=kv, v=kv)


def on_shards(function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function that runs on each device's part of the arrays; the same function if there is no mesh."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
