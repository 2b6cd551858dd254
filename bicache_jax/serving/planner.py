"""From requests to the plan of a run: prefixes found, boundaries chosen, rows packed into batches that fit."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Sequence

import jax.numpy as jnp

from bicache_jax.core.boundary import boundary_at
from bicache_jax.core.config import CacheConfig
from bicache_jax.core.device import DeviceMemory
from bicache_jax.core.layout import decoded_tokens, given_tokens, whole_blocks
from bicache_jax.core.types import BicacheError, Model, Request
from bicache_jax.serving.grouping import Row, default_rows, detect_prefixes, prefix_ratio
from bicache_jax.serving.memory import Buffers
from bicache_jax.serving.placement import Placement
from bicache_jax.serving.plan import Plan, rows_fitting
from bicache_jax.serving.rounds import Round, plan_rounds
from bicache_jax.serving.store import PrefixStore
from bicache_jax.wiring import device_memory


def cache_for(model: Model, cache: CacheConfig) -> CacheConfig:
    """The cache of a model, its policy settled.

    Raises:
        BicacheError: the policy is not one for the model's attention.
    """
    try:
        return cache.for_model(model.config)
    except ValueError as error:
        raise BicacheError(str(error)) from None


def boundary_rule(model: Model, cache: CacheConfig) -> Callable[[int], int]:
    """Boundary by prefix ratio.

    Raises:
        BicacheError: there is no boundary table for the model, or a boundary is deeper than the model.
    """
    num_layers = model.config.num_layers
    if cache.policy == "none":
        return lambda ratio: 0
    if cache.boundary != "auto":
        boundary = cache.boundary
        if boundary > num_layers:
            raise BicacheError(f"boundary: {boundary} is deeper than the model's {num_layers} layers")
        return lambda ratio: boundary
    if cache.policy in ("naive", "exact"):
        return lambda ratio: num_layers
    table = cache.table if cache.table is not None else model.boundaries
    if table is None:
        raise BicacheError(
            f"{model.name or 'model'}: no boundary table belongs to it; make one with 'bicache profile', "
            "or give a boundary"
        )
    if table is model.boundaries and model.note:
        warnings.warn(model.note, UserWarning, stacklevel=3)
    deepest = max(table.values(), default=0)
    if deepest > num_layers:
        raise BicacheError(f"boundary table: boundary {deepest} is deeper than the model's {num_layers} layers")
    return lambda ratio: boundary_at(table, ratio)


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans runs of a model.

    Attributes:
        placement: where the arrays lie; it knows the architecture.
        cache: how prefixes are reused.
        boundary_of: boundary by prefix ratio (`boundary_rule`).
        dtype: of parameters and caches.
        weights: bytes of the parameters on a device.
        batch_size: most rows of a batch; None: planned from the shapes.
    """

    placement: Placement
    cache: CacheConfig
    boundary_of: Callable[[int], int]
    dtype: jnp.dtype
    weights: int
    batch_size: int | None

    def rows(self, requests: Sequence[Request], added: Collection[tuple[int, ...]], namespace: str = "") -> list[Row]:
        """Requests as rows: prefix found, boundary chosen.

        Args:
            requests: all requests of a call.
            added: prefixes that were added by hand.
            namespace: theirs.
        """
        lengths: Sequence[int] = [0] * len(requests)
        if self.cache.policy != "none":
            lengths = detect_prefixes(
                requests,
                min_prefix=self.cache.min_prefix,
                min_suffix=self.placement.config.shifted,
                detection=self.cache.prefix_detection,
                added=added,
            )
        rows = []
        for request, found in zip(requests, lengths, strict=True):
            row = self.row(request, found, namespace)
            rows += [dataclasses.replace(row, sample=sample) for sample in range(request.n)]
        return rows

    def row(self, request: Request, prefix_len: int, namespace: str = "") -> Row:
        """The row of a request's first sample.

        Args:
            request: the request.
            prefix_len: tokens of the prefix that was found for it.
            namespace: the prefix's.
        """
        sampling, prompt_len, config = request.sampling, len(request.prompt_ids), self.placement.config
        prefix_len = whole_blocks(prefix_len, prompt_len, sampling.block_size, config)
        given = given_tokens(prompt_len, sampling.block_size, config)
        ratio = prefix_ratio(prefix_len, prompt_len + sampling.gen_length)
        return Row(
            request,
            0,
            prefix_len,
            ratio,
            self.boundary_of(ratio) if prefix_len or self.cache.policy == "exact" else 0,
            # An encoding under a block-causal mask belongs to one length of blocks.
            namespace=f"{namespace}\n{sampling.block_size}" if config.block_causal else namespace,
            filled=decoded_tokens(given, sampling, config) - given - sampling.gen_length,
        )

    def plan(self, rows: Sequence[Row], store: PrefixStore, *, growing: bool = False) -> Plan:
        """The plan of a run that ends with these rows; `growing` as in `Plan`."""
        placement, device = self.placement, self._device(store)
        rounds = plan_rounds(
            placement.config,
            self.cache,
            rows,
            shards=placement.shards,
            batch_size=self.batch_size,
            rows_of=self._fitting({row.boundary for row in rows}, device),
        )
        buffers = Buffers.of(rounds, placement.config.num_layers)
        if any(row.prefix_len for row in rows):
            buffers = store.sized(buffers)
        return dataclasses.replace(self._plan(tuple(rounds), buffers, device), growing=growing)

    def endless(self, store: PrefixStore, lanes: int) -> tuple[Plan, Callable[[Row], int]]:
        """A plan for rows that are not known yet, and how many rows the batch of one may have.

        Args:
            store: what keeps the prefixes.
            lanes: batches that are open at once, and share the memory.
        """
        device, num_layers = self._device(store), self.placement.config.num_layers
        if device is not None:
            share = max(0, device.nbytes - self.weights) // lanes
            device = dataclasses.replace(device, nbytes=self.weights + share)
        used = {min(self.boundary_of(ratio), num_layers - 1) for ratio in range(101)}
        buffers = store.sized(Buffers.between(min(used), max(used), num_layers))
        fitting = self._fitting(used, device) or default_rows

        def places(row: Row) -> int:
            copies = 1 + row.request.sampling.guided
            prefix, suffix = row.buckets
            return self.batch_size or fitting(copies * prefix, copies * suffix)

        return self._plan((), buffers, device), places

    def _device(self, store: PrefixStore) -> DeviceMemory | None:
        """Memory of a device, without what is set aside for prefixes that are kept."""
        device = device_memory(self.placement.devices)
        return device and dataclasses.replace(device, nbytes=max(0, device.nbytes - store.budget))

    def _fitting(self, boundaries: Collection[int], device: DeviceMemory | None) -> Callable[[int, int], int] | None:
        if device is None:
            return None
        return rows_fitting(boundaries, self.placement.partition, self.weights, device, self.cache, self.dtype)

    def _plan(self, rounds: tuple[Round, ...], buffers: Buffers, device: DeviceMemory | None) -> Plan:
        config, local = self.placement.config, self.placement.partition.local
        return Plan(config, self.dtype, self.cache, rounds, buffers, local, self.weights, device)
