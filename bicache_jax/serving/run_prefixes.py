"""The prefixes of one run, between its lanes and the store that outlives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.serving.flops import encode_flops
from bicache_jax.serving.grouping import Named, Row
from bicache_jax.serving.memory import prefix_bytes
from bicache_jax.serving.placement import Piece
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.store import Key, PrefixStore, Source


class RunPrefixes:
    """The prefixes of one run: each found or encoded when its first row begins, and in use until its last one has."""

    def __init__(self, plan: Plan, store: PrefixStore) -> None:
        """Nothing is encoded yet.

        Args:
            plan: the run, for its sizes.
            store: where encodings are found, and kept.
        """
        self._plan, self._store = plan, store
        self._pieces: dict[Key, tuple[Piece, frozenset[int]]] = {}
        self._uses: Counter[Key] = Counter()
        self._boundaries: dict[Named, Counter[int]] = {}

    def _key(self, shard: int, prefix: Named) -> Key:
        buffers, (namespace, tokens) = self._plan.buffers, prefix
        return Key(shard, tokens, self._plan.prefix_bucket(len(tokens)), buffers.shallow, buffers.slots, namespace)

    def expect(self, shard: int, row: Row) -> None:
        """A row is to run on a data shard; `release` says that it has begun, or never will."""
        boundary = clamp_boundary(row.boundary, self._plan.config.num_layers)
        for prefix in row.named(self._plan.config.mask_id):
            self._uses[self._key(shard, prefix)] += 1
            self._boundaries.setdefault(prefix, Counter())[boundary] += 1

    def _wanted(self, prefix: Named, boundary: int) -> set[int]:
        """Boundaries that the rows of the run need, if there is room for all; else the one."""
        wanted = {boundary, *self._boundaries[prefix]}
        return wanted if len(wanted) <= self._plan.buffers.slots else {boundary}

    def boundaries(self, shard: int, prefix: Named, boundary: int) -> list[int]:
        """Boundaries to encode a prefix for: those of this run, and those of earlier ones where there is room."""
        used = self._wanted(prefix, boundary)
        earlier = self._store.known(self._key(shard, prefix)) - used
        if earlier:
            self._store.want_slots(len(used | earlier))
        room = self._plan.buffers.slots - len(used)
        return sorted(used | set(sorted(earlier)[: max(0, room)]))

    def find(self, shard: int, prefix: Named, boundary: int) -> Piece | None:
        """A shard's part of an encoding, of this run or an earlier one; None if it has to be made."""
        key = self._key(shard, prefix)
        if key in self._pieces and boundary in self._pieces[key][1]:
            return self._pieces[key][0]
        wanted = self._wanted(prefix, boundary)
        if (found := self._store.get(key, wanted)) is not None:
            self._hold(key, found, wanted)
        elif (stored := self._store.load(key, wanted)) is not None:
            found, served, source = stored
            self._put(key, found, served, source)
        return found

    def beginning(self, shard: int, prefix: Named, block: int) -> tuple[Piece | None, int]:
        """An encoding of a prefix's first blocks and their tokens, as in `PrefixStore`; (None, 0) if there is none."""
        return self._store.beginning(self._key(shard, prefix), block) or (None, 0)

    def put(self, shard: int, prefix: Named, piece: Piece, boundaries: Collection[int]) -> None:
        """Keeps a shard's part of an encoding."""
        self._put(self._key(shard, prefix), piece, boundaries)

    def _hold(self, key: Key, piece: Piece, boundaries: Collection[int]) -> None:
        """Remembers a piece that the store counts as used; once, whatever it replaces."""
        if key in self._pieces:
            self._store.done(key)
        self._pieces[key] = piece, frozenset(boundaries)

    def _put(self, key: Key, piece: Piece, boundaries: Collection[int], source: Source | None = None) -> None:
        plan = self._plan
        nbytes = prefix_bytes(
            plan.part or plan.config,
            plan.dtype.itemsize,
            length=key.length,
            layers=key.layers,
            slots=key.slots,
            cache_dtype=plan.cache.cache_dtype,
        )
        flops = encode_flops(plan.config, len(key.tokens), max(boundaries))
        self._store.put(key, piece, boundaries, nbytes=nbytes, flops=flops, source=source)
        self._hold(key, piece, boundaries)

    def release(self, shard: int, row: Row) -> None:
        """Ends what `expect` began; encodings that no other row waits for are no longer in use."""
        boundary = clamp_boundary(row.boundary, self._plan.config.num_layers)
        for prefix in row.named(self._plan.config.mask_id):
            key = self._key(shard, prefix)
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]
                self._end(key)
            used = self._boundaries[prefix]
            used[boundary] -= 1
            if not used[boundary]:
                del used[boundary]
            if not used:
                del self._boundaries[prefix]

    def save(self) -> None:
        """Writes what was encoded to disk, where that is asked for."""
        self._store.save()

    def close(self) -> None:
        """Ends the run, given up or not; what it has encoded is written to disk, where that is asked for."""
        for key in list(self._pieces):
            self._end(key)
        self.save()

    def _end(self, key: Key) -> None:
        if self._pieces.pop(key, None) is not None:
            self._store.done(key)
