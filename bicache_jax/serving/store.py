"""Caches of encoded prefixes, each kept from its first batch to its last. The engine's only mutable state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.serving.placement import Piece
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.rounds import Round

Prefix = tuple[int, ...]


class PrefixStore:
    """Prefixes of a run by data shard; a shard only holds the prefixes that its own rows use."""

    def __init__(self, plan: Plan) -> None:
        self._pieces: dict[tuple[int, int, Prefix], Piece] = {}
        self._uses: Counter[tuple[int, int, Prefix]] = Counter()
        self._boundaries: dict[Prefix, set[int]] = {}
        for batches in plan.rounds:
            self._uses.update(self._keys(batches, plan.shape(*batches)[1]))
            for batch in batches:
                for prefix in batch.prefixes:
                    used = self._boundaries.setdefault(prefix, set())
                    used.add(clamp_boundary(batch.boundary, plan.config.num_layers))

    @staticmethod
    def _keys(batches: Round, length: int) -> list[tuple[int, int, Prefix]]:
        return [(shard, length, prefix) for shard, batch in enumerate(batches) for prefix in batch.prefixes]

    def boundaries(self, prefix: Prefix) -> list[int]:
        """Boundaries at which the prefix is used in this run."""
        return sorted(self._boundaries[prefix])

    def missing(self, batches: Round, length: int) -> list[tuple[Prefix | None, ...]]:
        """Prefixes to encode for a round, one per shard at a time; None for a shard that needs no more."""
        lacking = [
            [prefix for prefix in batch.prefixes if (shard, length, prefix) not in self._pieces]
            for shard, batch in enumerate(batches)
        ]
        return list(zip_longest(*lacking))

    def put(self, shard: int, length: int, prefix: Prefix, piece: Piece) -> None:
        """Keeps a shard's part of an encoding."""
        self._pieces[shard, length, prefix] = piece

    def columns(self, batches: Round, length: int, groups: int) -> list[Sequence[Piece]]:
        """The round's prefixes as `groups` caches of one prefix per shard; a shard with fewer repeats its first."""
        return [
            [
                self._pieces[shard, length, batch.prefixes[number if number < len(batch.prefixes) else 0]]
                for shard, batch in enumerate(batches)
            ]
            for number in range(groups)
        ]

    def release(self, batches: Round, length: int) -> None:
        """Drops the prefixes that no later round uses."""
        for key in self._keys(batches, length):
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._pieces[key]
