"""Policies by name, as commands and studies that compare several of them take them.

    bicache+dual@w8+int8

Behind the policy a block cache, and behind `@` what is in another form than by default: weights, prefix KV, or both.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from bicache_jax.core.config import (
    BLOCK_CACHES,
    CACHE_DTYPES,
    POLICIES,
    QUANTIZE,
    BlockCache,
    CacheConfig,
    CacheDtype,
    Policy,
    SamplingConfig,
)
from bicache_jax.core.types import BicacheError


def _forms(name: str) -> tuple[str, ...]:
    """What a name says behind `@`."""
    return tuple(form for form in name.partition("@")[2].split("+") if form)


def weights_of(name: str) -> str:
    """The format of weights that a policy's name has behind `@`; empty if none."""
    return next((form for form in _forms(name) if form in QUANTIZE), "")


def in_forms(policies: Sequence[str], quantize: Sequence[str], cache_dtypes: Sequence[str]) -> list[str]:
    """Policies in every combination of forms.

    Args:
        policies: their names.
        quantize: formats of weights; the first is everybody's, and not named.
        cache_dtypes: forms of prefix KV, of which `auto` is not named; a policy without a prefix cache has none.
    """
    found: dict[str, None] = {}
    for weights, kept, name in itertools.product(quantize, cache_dtypes, policies):
        cached = name.partition("+")[0] != "none"
        forms = [weights] * (weights != quantize[0]) + [kept] * (cached and kept != "auto")
        found[f"{name}@{'+'.join(forms)}" if forms else name] = None
    return list(found)


def parse_policy(name: str, cache: CacheConfig) -> CacheConfig:
    """A policy by name: `none`, `naive`, `bicache`, each also with `+prefix` or `+dual`, and with forms behind `@`.

    Args:
        name: the name; a format of weights in it says nothing about the cache (`weights_of`).
        cache: settings that policies share.

    Raises:
        BicacheError: the name is none of these.
    """
    policies: dict[str, Policy] = {policy: policy for policy in POLICIES}
    caches: dict[str, BlockCache] = {cache: cache for cache in BLOCK_CACHES}
    dtypes: dict[str, CacheDtype] = {form: form for form in CACHE_DTYPES}
    policy, _, block_cache = name.partition("@")[0].partition("+")
    if policy not in policies or (block_cache or "off") not in caches:
        raise BicacheError(f"policy {name!r}: must be one of {', '.join(POLICIES)}, each also with +prefix or +dual")
    for form in _forms(name):
        if form not in (*QUANTIZE, *CACHE_DTYPES):
            raise BicacheError(f"policy {name!r}: {form!r} is neither a format of weights nor one of prefix KV")
    return dataclasses.replace(
        cache,
        policy=policies[policy],
        block_cache=caches[block_cache or "off"],
        boundary=cache.boundary if policy == "bicache" else "auto",
        cache_dtype=next((dtypes[form] for form in _forms(name) if form in dtypes), cache.cache_dtype),
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
