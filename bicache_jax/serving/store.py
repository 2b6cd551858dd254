"""The prefix store: encoded prefixes, kept from call to call within a budget. The engine's only mutable state.

An entry is a data shard's part of one prefix's encoding. It is found by the tokens themselves, compared, and by the
sizes of its arrays; it serves rows of the boundaries that it was encoded for. Under full attention the encoding of a
longer prefix is not that of a shorter one, so nothing but the same tokens is a hit.

What is in the store never changes a result, only how soon it is there.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from bicache_jax.core.table import fields_table, mebibytes
from bicache_jax.serving.host_tier import HostTier
from bicache_jax.serving.memory import Buffers
from bicache_jax.serving.placement import Piece

Prefix = tuple[int, ...]
Source = Literal["host", "disk"]

MOST_SLOTS = 4
"""Boundaries for which the store asks that a prefix keep its hidden states, where calls differ in theirs."""


class Key(NamedTuple):
    """What an entry is found by.

    Attributes:
        shard: the data shard on whose devices it lies.
        tokens: the prefix.
        length: P, to which it is padded.
        layers: layers of KV that its arrays have room for.
        slots: boundaries whose hidden states they have room for.
        namespace: of the requests that it serves.
    """

    shard: int
    tokens: Prefix
    length: int
    layers: int
    slots: int
    namespace: str = ""


@dataclasses.dataclass
class _Entry:
    piece: Piece
    boundaries: frozenset[int]
    nbytes: int
    worth: float  # operations that encoding it takes, per byte
    priority: float = 0.0
    users: int = 0


@dataclasses.dataclass(frozen=True)
class PrefixStats:
    """What a prefix store has done so far.

    Attributes:
        entries: encodings in the store; on a mesh, of all data shards.
        nbytes: their bytes on a device, of the shard that has most.
        budget: bytes on a device that it may keep while nothing runs.
        hits: encodings that a run found.
        disk_hits: those of them that it found on disk.
        host_hits: those of them that it found in the host's memory.
        host_nbytes: bytes that are kept there, of all devices.
        misses: encodings that a run had to make.
        evictions: encodings that were dropped, or moved to the host, to stay within the budget.
        flops_saved: operations of the encodings that were found.
    """

    entries: int = 0
    nbytes: int = 0
    budget: int = 0
    hits: int = 0
    disk_hits: int = 0
    host_hits: int = 0
    host_nbytes: int = 0
    misses: int = 0
    evictions: int = 0
    flops_saved: float = 0.0

    def _repr_html_(self) -> str:
        return fields_table(self, _shown)._repr_html_()


def _shown(name: str, count: float) -> object:
    """A count as people read it."""
    if name in ("nbytes", "budget", "host_nbytes"):
        return mebibytes(count)
    return f"{count:.3g}" if name == "flops_saved" else count


@runtime_checkable
class Files(Protocol):
    """Where encodings are kept on disk (`bicache_jax.serving.prefix_files`)."""

    def load(self, key: Key, boundaries: Collection[int]) -> tuple[Piece, frozenset[int]] | None:
        """An encoding that serves these boundaries, and all that it serves; None if there is none."""
        ...

    def save(self, key: Key, piece: Piece, boundaries: Collection[int]) -> None:
        """Keeps an encoding."""
        ...


class PrefixStore:
    """Encoded prefixes within a budget of bytes.

    What a run uses stays until it is done with it, whatever the budget. Of the rest, the least valuable goes first: by
    operations saved per byte, and by how long ago it was used (GreedyDual-Size, Cao and Irani 1997).
    """

    def __init__(self, budget: int, files: Files | None = None, host_budget: int = 0, block: int = 1) -> None:
        """Begins empty.

        Args:
            budget: bytes on a device; 0 keeps nothing between runs.
            files: where encodings outlive the process, and are found by others.
            host_budget: bytes of the host's memory, for each device, for what has no room there.
            block: tokens of a block, under block-causal attention: of a prefix, whole blocks are kept.
        """
        self._block = block
        self._budget, self._files, self._host = budget, files, HostTier(host_budget)
        self._unsaved: dict[Key, tuple[Piece, frozenset[int]]] = {}
        self._entries: dict[Key, _Entry] = {}
        self._pinned: set[Prefix] = set()
        self._age = 0.0
        self._stats = PrefixStats(budget=budget)
        self._layers, self._slots = 0, 1

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, tokens: object) -> bool:
        return any(self._is_of(key.tokens, tokens) for key in self._entries)

    def _is_of(self, kept: Prefix, prefix: Any) -> bool:
        """Whether an entry's tokens are what is kept of a prefix."""
        return 0 <= len(prefix) - len(kept) < self._block and kept == tuple(prefix[: len(kept)])

    @property
    def budget(self) -> int:
        """Bytes on a device that it may keep while nothing runs."""
        return self._budget

    @property
    def stats(self) -> PrefixStats:
        """The counts so far."""
        of_shard: Counter[int] = Counter()
        for key, entry in self._entries.items():
            of_shard[key.shard] += entry.nbytes
        return dataclasses.replace(
            self._stats,
            entries=len(self._entries),
            nbytes=max(of_shard.values(), default=0),
            host_nbytes=self._host.nbytes,
        )

    def sized(self, buffers: Buffers) -> Buffers:
        """The buffers of a run, at least as large as those of earlier ones, so that it finds what they left."""
        return dataclasses.replace(
            buffers, shallow=max(buffers.shallow, self._layers), slots=max(buffers.slots, self._slots)
        )

    def pin(self, tokens: Prefix) -> None:
        """Keeps a prefix, once it is encoded, whatever the budget."""
        self._pinned.add(tokens)

    def unpin(self, tokens: Prefix) -> None:
        """Lets it go when the budget asks for it."""
        self._pinned.discard(tokens)
        self._shrink()

    def drop(self, tokens: Prefix) -> None:
        """Drops the encodings of a prefix, except for what a run is using."""
        mine = [key for key in self._entries if self._is_of(key.tokens, tokens)]
        self._remove(mine)
        for kept in {tokens, *(key.tokens for key in mine)}:
            self._host.drop(kept)

    def clear(self) -> None:
        """Drops all encodings, except for what a run is using."""
        self._remove(list(self._entries))
        self._host.drop()

    def renewed(self) -> PrefixStore:
        """An empty store for other weights, with this one's budget and pins; runs of the old ones end on this one."""
        store = PrefixStore(self._budget, host_budget=self._host.budget, block=self._block)
        store._pinned, store._layers, store._slots = set(self._pinned), self._layers, self._slots
        return store

    def save(self) -> None:
        """Writes the encodings that were made since the last call, where there are files."""
        while self._unsaved and self._files is not None:
            key, (piece, boundaries) = self._unsaved.popitem()
            self._files.save(key, piece, boundaries)

    def get(self, key: Key, boundaries: Collection[int]) -> Piece | None:
        """An entry that serves all these boundaries, which then counts as used until `done`; None if there is none."""
        entry = self._entries.get(key)
        if entry is None or not entry.boundaries.issuperset(boundaries):
            return None
        entry.users += 1
        entry.priority = self._age + entry.worth
        self._count(hits=1, flops_saved=entry.worth * entry.nbytes)
        return entry.piece

    def beginning(self, key: Key, block: int) -> tuple[Piece, int] | None:
        """The longest entry that is some of a prefix's first blocks, under block-causal attention, and its tokens.

        Whatever follows them, blocks have the same KV: what is behind such an entry alone has to be encoded.

        Args:
            key: what the whole prefix would be found by.
            block: tokens of a block; the last one ends with the prefix.
        """
        best: Key | None = None
        for other, entry in self._entries.items():
            size = len(other.tokens)
            if (
                (best is None or size > len(best.tokens))
                and 0 < size < len(key.tokens)
                and not (len(key.tokens) - size) % block
                and other[2:] == key._replace(length=other.length)[2:]
                and other.shard == key.shard
                and entry.boundaries
                and other.tokens == key.tokens[:size]
            ):
                best = other
        if best is None:
            return None
        entry = self._entries[best]
        entry.priority = self._age + entry.worth
        return entry.piece, len(best.tokens)

    def load(self, key: Key, boundaries: Collection[int]) -> tuple[Piece, frozenset[int], Source] | None:
        """An encoding that serves all these boundaries, what it serves, and where it was; None if there is none."""
        if (hosted := self._host.take(key, frozenset(boundaries))) is not None:
            return *hosted, "host"
        stored = None if self._files is None else self._files.load(key, boundaries)
        return None if stored is None else (*stored, "disk")

    def known(self, key: Key) -> frozenset[int]:
        """The boundaries that an entry serves; none if there is none."""
        entry = self._entries.get(key)
        return frozenset() if entry is None else entry.boundaries

    def put(
        self,
        key: Key,
        piece: Piece,
        boundaries: Collection[int],
        *,
        nbytes: int,
        flops: float,
        source: Source | None = None,
    ) -> None:
        """Adds an entry, in use until `done`; it replaces one of the same key.

        Args:
            key: what it is found by.
            piece: the encoding.
            boundaries: boundaries that it serves.
            nbytes: its bytes on a device.
            flops: operations that encoding it takes.
            source: where it was found; None: it was made.
        """
        before = self._entries.get(key)
        worth = flops / max(1, nbytes)
        users = 1 + (before.users if before is not None else 0)
        self._entries[key] = _Entry(piece, frozenset(boundaries), nbytes, worth, self._age + worth, users)
        self._layers = max(self._layers, key.layers)
        if source is not None:
            self._count(hits=1, flops_saved=flops, **{f"{source}_hits": 1})
            return
        self._count(misses=1)
        if self._files is not None:
            self._unsaved[key] = piece, frozenset(boundaries)

    def want_slots(self, count: int) -> None:
        """Asks that runs to come keep hidden states of so many boundaries of a prefix."""
        self._slots = max(self._slots, min(count, MOST_SLOTS))

    def done(self, key: Key) -> None:
        """Ends one use of an entry."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.users = max(0, entry.users - 1)
        self._shrink()

    def _shrink(self) -> None:
        """Drops entries until the rest is within the budget on every shard.

        All processes of a mesh must drop the same, so that they encode the same: what is compared follows from shapes
        and from the order of use, not from what lies in a process.
        """
        kept: Counter[int] = Counter()
        for key, entry in self._entries.items():
            kept[key.shard] += 0 if entry.users else entry.nbytes
        for shard in sorted(kept):
            while kept[shard] > self._budget:
                loose = [
                    (entry.priority, place, key)
                    for place, (key, entry) in enumerate(self._entries.items())
                    if key.shard == shard
                    and not entry.users
                    and not any(self._is_of(key.tokens, pinned) for pinned in self._pinned)
                ]
                if not loose:
                    break
                priority, _, key = min(loose, key=lambda one: one[:2])
                self._age = max(self._age, priority)
                entry = self._entries.pop(key)
                kept[shard] -= entry.nbytes
                self._host.put(key, entry.piece, entry.boundaries, entry.nbytes)
                self._count(evictions=1)

    def _remove(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if not self._entries[key].users:
                del self._entries[key]

    def _count(self, **more: float) -> None:
        now: dict[str, Any] = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = dataclasses.replace(self._stats, **now)
