"""Encodings that had no room on the devices, kept in the host's memory until they are asked for again."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import jax
import numpy as np

from bicache_jax.core.config import CacheDtype
from bicache_jax.serving.placement import Piece

PINNED = "pinned_host"


@dataclasses.dataclass(frozen=True)
class Hosted:
    """An encoding in the host's memory.

    Attributes:
        leaves: as `Piece.leaves`: in memory that the device can copy from, or in NumPy where a platform has none.
        shardings: where each array came from.
        cache_dtype: as `Piece.cache_dtype`.
    """

    leaves: tuple[tuple[Any, ...], ...]
    shardings: tuple[tuple[Any, ...], ...]
    cache_dtype: CacheDtype

    @classmethod
    def of(cls, piece: Piece) -> Hosted:
        """A copy of a piece."""
        shardings = tuple(tuple(array.sharding for array in leaf) for leaf in piece.leaves)
        return cls(tuple(tuple(map(_to_host, leaf)) for leaf in piece.leaves), shardings, piece.cache_dtype)

    def piece(self) -> Piece:
        """The piece, on its devices again."""
        pairs = zip(self.leaves, self.shardings, strict=True)
        leaves = tuple(tuple(map(jax.device_put, leaf, shardings)) for leaf, shardings in pairs)
        return Piece(leaves, self.cache_dtype)


def _to_host(array: Any) -> Any:
    devices = array.sharding.device_set
    if array.size and all(device.platform != "cpu" and _has_pinned(device) for device in devices):
        return jax.device_put(array, array.sharding.with_memory_kind(PINNED))
    return np.asarray(array)


def _has_pinned(device: Any) -> bool:
    return any(memory.kind == PINNED for memory in device.addressable_memories())


class HostTier:
    """Encodings by key, within a budget of bytes; what was put in first goes first."""

    def __init__(self, budget: int) -> None:
        """Begins empty.

        Args:
            budget: bytes of the host's memory, for each device; 0 keeps nothing.
        """
        self.budget = budget
        self._held: OrderedDict[Any, tuple[Hosted, frozenset[int], int]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, of all devices."""
        return sum(size for *_, size in self._held.values())

    def put(self, key: Any, piece: Piece, boundaries: frozenset[int], nbytes: int) -> None:
        """Keeps an encoding, where it fits."""
        if nbytes > self.budget:
            return
        self._held.pop(key, None)
        self._held[key] = Hosted.of(piece), boundaries, nbytes
        while self._of_shard(key.shard) > self.budget:
            del self._held[next(other for other in self._held if other.shard == key.shard)]

    def _of_shard(self, shard: int) -> int:
        return sum(size for key, (*_, size) in self._held.items() if key.shard == shard)

    def take(self, key: Any, boundaries: frozenset[int]) -> tuple[Piece, frozenset[int]] | None:
        """An encoding that serves these boundaries, back on its devices and no longer here; None if there is none."""
        held = self._held.get(key)
        if held is None or not held[1].issuperset(boundaries):
            return None
        del self._held[key]
        return held[0].piece(), held[1]

    def drop(self, tokens: tuple[int, ...] | None = None) -> None:
        """Forgets the encodings of a prefix; None: all."""
        for key in [key for key in self._held if tokens is None or key.tokens == tokens]:
            del self._held[key]
