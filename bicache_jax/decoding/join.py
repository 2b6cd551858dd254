"""Joins caches of single prefixes into the cache of a batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from bicache_jax.core.cache import PrefixCache
from bicache_jax.sharding import PER_SHARD, PREFIX, on_shards


@functools.partial(jax.jit, static_argnames=("mesh",))
def join_prefixes(
    caches: tuple[PrefixCache, ...], boundary: Int[Array, " S"], *, mesh: Mesh | None = None
) -> PrefixCache:
    """Joins G caches of one prefix into one cache of G prefixes, with the hidden states before one boundary.

    Args:
        caches: G caches of one prefix each; on a mesh, of one prefix on each data shard.
        boundary: the boundary; on a mesh, one per data shard.
        mesh: the mesh that holds them; None: one device.

    Returns:
        The joined cache.
    """

    def join(caches: tuple[PrefixCache, ...], boundary: Array) -> PrefixCache:
        return PrefixCache(
            k=jnp.concatenate([cache.k for cache in caches], axis=1),
            v=jnp.concatenate([cache.v for cache in caches], axis=1),
            hidden=jnp.concatenate([cache.hidden_at(boundary[0]) for cache in caches], axis=0)[None],
            boundaries=boundary,
            length=jnp.concatenate([cache.length for cache in caches]),
        )

    return on_shards(join, mesh, ((PREFIX,) * len(caches), PER_SHARD), PREFIX)(caches, boundary)
