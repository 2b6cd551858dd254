"""Policies by name, as commands and studies that compare several of them take them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from bicache_jax.core.config import BLOCK_CACHES, POLICIES, BlockCache, CacheConfig, Policy, SamplingConfig
from bicache_jax.core.types import BicacheError


def parse_policy(name: str, cache: CacheConfig) -> CacheConfig:
    """A policy by name: `none`, `naive`, `bicache`, each also with `+prefix` or `+dual`.

    Args:
        name: the name.
        cache: settings that policies share.

    Raises:
        BicacheError: the name is none of these.
    """
    policies: dict[str, Policy] = {policy: policy for policy in POLICIES}
    caches: dict[str, BlockCache] = {cache: cache for cache in BLOCK_CACHES}
    policy, _, block_cache = name.partition("+")
    if policy not in policies or (block_cache or "off") not in caches:
        raise BicacheError(f"policy {name!r}: must be one of {', '.join(POLICIES)}, each also with +prefix or +dual")
    return dataclasses.replace(
        cache,
        policy=policies[policy],
        block_cache=caches[block_cache or "off"],
        boundary=cache.boundary if policy == "bicache" else "auto",
    )


def comparable(caches: Iterable[CacheConfig]) -> CacheConfig:
    """The policy whose block length all of them take where none is named, so that they differ in their caches alone.

    It is the first with a block cache; without one, any.
    """
    listed = list(caches)
    return next((cache for cache in listed if cache.block_cache != "off"), listed[0])


def comparable_blocks(caches: Iterable[CacheConfig], sampling: SamplingConfig) -> SamplingConfig:
    """The decoding settings under which these policies are compared.

    Raises:
        BicacheError: lengths and steps do not go together.
    """
    try:
        return comparable(caches).with_blocks(sampling)
    except ValueError as error:
        raise BicacheError(str(error)) from None


def reference_of(policies: Sequence[str]) -> int:
    """Place of the policy that the others are compared with: `none` if it is named, else the first."""
    return list(policies).index("none") if "none" in policies else 0
