"""Prefixes on their way into a batch: encoded where no encoding is known, and written into places of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from bicache_jax.core.cache import PrefixCache
from bicache_jax.decoding.places import no_prefixes, put_prefix
from bicache_jax.serving.executor import Executor
from bicache_jax.serving.grouping import Named
from bicache_jax.serving.placement import Piece
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.programs import EncodeCall
from bicache_jax.serving.run_prefixes import RunPrefixes


class PrefixWriter:
    """Fills the prefix caches of batches of one length P, on all data shards at a time."""

    def __init__(
        self, executor: Executor, plan: Plan, known: RunPrefixes, sizes: dict[str, Any], block_length: int
    ) -> None:
        """Nothing is encoded yet.

        Args:
            executor: what runs the encoder.
            plan: the run.
            known: its prefixes, which expect the rows.
            sizes: of the caches, as `bicache_jax.decoding.places.no_prefixes` takes them.
            block_length: tokens of a block, under block-causal attention.
        """
        self._executor, self._plan, self._known = executor, plan, known
        self._sizes, self._block_length = sizes, block_length
        self._blank: list[Piece] | None = None

    def room(self) -> PrefixCache:
        """A cache without a prefix."""
        placement = self._executor.placement
        return no_prefixes(placement.partition.local, **self._sizes, mesh=placement.mesh)

    def beginning(self, prefix: Named | None) -> tuple[Piece | None, int]:
        """Under block-causal attention, an encoding of a prefix's first blocks, and their tokens; else nothing."""
        if prefix is None or self._executor.placement.shards > 1 or not self._plan.config.block_causal:
            return None, 0
        return self._known.beginning(0, prefix, self._block_length)

    def encode(self, lacking: Sequence[Sequence[Named]], boundaries: Sequence[int]) -> None:
        """Encodes prefixes that are not known, one on every data shard at a time.

        Args:
            lacking: those of each data shard.
            boundaries: the boundary of each data shard's rows, at most L - 1.
        """
        executor = self._executor
        for prefixes in zip_longest(*lacking):
            used = [
                [] if prefix is None else self._known.boundaries(shard, prefix, boundaries[shard])
                for shard, prefix in enumerate(prefixes)
            ]
            tokens = [None if prefix is None else prefix[1] for prefix in prefixes]
            before, begun = self.beginning(prefixes[0])
            length: int = self._sizes["length"]
            pieces = executor.placement.split(
                executor.encode(EncodeCall(self._plan, tokens, used, length, self._block_length, before, begun))
            )
            for shard, prefix in enumerate(prefixes):
                if prefix is not None:
                    self._known.put(shard, prefix, pieces[shard], used[shard])
            made = sum(prefix is not None for prefix in prefixes)
            executor.counters.add(prefixes_encoded=made, prefix_hits=-made)

    def write(
        self, cache: PrefixCache, writes: Sequence[Sequence[tuple[int, Named]]], boundaries: Sequence[int]
    ) -> PrefixCache:
        """Writes encoded prefixes into their places, one on every data shard at a time.

        Args:
            cache: the batches' cache (donated).
            writes: the places and prefixes of each data shard.
            boundaries: as in `encode`.
        """
        placement = self._executor.placement
        boundary = placement.put([np.asarray([b], np.int32) for b in boundaries])
        for turn in zip_longest(*writes):
            pieces = [
                self._piece(shard, None if write is None else write[1], boundaries[shard])
                for shard, write in enumerate(turn)
            ]
            cache = put_prefix(
                cache,
                placement.assemble(pieces),
                placement.put([np.asarray([-1 if write is None else write[0]], np.int32) for write in turn]),
                boundary,
                mesh=placement.mesh,
            )
        return cache

    def _piece(self, shard: int, prefix: Named | None, boundary: int) -> Piece:
        """A shard's part of an encoding; None: that of a shard with nothing to write."""
        if prefix is not None:
            found = self._known.find(shard, prefix, boundary)
            assert found is not None
            return found
        if self._blank is None:
            placement = self._executor.placement
            sizes = self._sizes | {"groups": 1, "slots": self._plan.buffers.slots}
            self._blank = placement.split(no_prefixes(placement.partition.local, **sizes, mesh=placement.mesh))
        return self._blank[shard]
