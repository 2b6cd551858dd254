"""Lanes: batches of a fixed shape whose rows leave when they are done, and whose free places waiting rows take.

    waiting rows -> join -> dispatch -> collect -> results

A lane has places for rows and for prefixes on every data shard. All that changes when a row joins is traced, so nothing
is compiled, and a row's tokens depend neither on when it joins nor on who else is there
(`bicache_jax.decoding.interval`). Every process of a mesh makes the same decisions: they follow from the rows' counts,
which all of them see.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.cache import DecodeState, Decoding, PrefixCache
from bicache_jax.decoding.interval import NO_LIMIT, decode
from bicache_jax.decoding.places import COUNTS, Look, look, more_prefixes, move_rows, seat
from bicache_jax.decoding.schedule import Stage, passes_saved
from bicache_jax.serving.executor import Executor
from bicache_jax.serving.grouping import Named, Row
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.prefix_writer import PrefixWriter
from bicache_jax.serving.programs import DecodeCall
from bicache_jax.serving.run_prefixes import RunPrefixes

EAGER = 16
"""A dispatch ends for waiting rows when a place in so many has become free, and at least one has."""


Joined = list[tuple[int, list[tuple[int, Named]]]]
"""Rows that join a data shard: the place of each, and the prefixes that are written for it, with their places."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """How a row stands after a dispatch.

    Attributes:
        row: the row.
        counts: its fields of `bicache_jax.decoding.places.COUNTS`.
        tokens: its suffix [U]; None where another process has it.
        cached: tokens of its prefix that were encoded for another row, or earlier.
    """

    row: Row
    counts: dict[str, int]
    tokens: np.ndarray | None
    cached: int = 0

    @property
    def done(self) -> bool:
        """Whether it has left the lane."""
        return bool(self.counts["done"])


class _Shard:
    """The places of a data shard."""

    def __init__(self, rows: int, prefixes: int, queue: deque[Row]) -> None:
        self.queue = queue
        self.guests: Sequence[deque[Row]] = ()
        self.rows: list[Row | None] = [None] * rows
        self.index: list[tuple[int, ...]] = [()] * rows  # prefix places of each row
        self.blocks = [0] * rows
        self.cached = [0] * rows
        self.prefixes: list[Named | None] = [None] * prefixes
        self.leader: Row | None = None  # a row with the settings that the decoding has
        self.given_up: list[int] = []  # places whose rows the device does not know to be gone

    @property
    def live(self) -> list[int]:
        return [place for place, row in enumerate(self.rows) if row is not None]

    @property
    def waiting(self) -> deque[Row] | None:
        """The queue from which the next row joins; None: nobody waits.

        Where this lane's own queue is empty, its free places are for guests: rows that would fit a lane of shorter
        suffixes. The passes that the last of its own rows needs are made anyway; once these have left, guests would
        make passes that are larger than theirs, so nobody joins any more.
        """
        if self.queue or self.leader is None:
            return self.queue or None
        if not any(row is not None and row.buckets == self.leader.buckets for row in self.rows):
            return None
        return next((queue for queue in self.guests if queue and queue[0].settings == self.leader.settings), None)

    def hold(self, prefixes: Sequence[Named]) -> list[tuple[int, bool]] | None:
        """A place for each prefix and whether it is to be written there; None if there is no room for all."""
        used = {index for row, places in zip(self.rows, self.index, strict=True) if row is not None for index in places}
        known = {prefix: index for index, prefix in enumerate(self.prefixes) if prefix is not None}
        kept = used | {known[prefix] for prefix in prefixes if prefix in known}
        free = [index for index in range(len(self.prefixes)) if index not in kept]
        free.sort(key=lambda index: self.prefixes[index] is not None)  # overwrite what may be of use last
        found: list[tuple[int, bool]] = []
        for prefix in prefixes:
            if prefix in known:
                found.append((known[prefix], False))
            elif not free:
                return None
            else:
                known[prefix] = free.pop(0)
                found.append((known[prefix], True))
        for prefix, (index, _) in zip(prefixes, found, strict=True):
            self.prefixes[index] = prefix
        return found


class Lane:
    """One lane on the devices."""

    def __init__(
        self,
        executor: Executor,
        plan: Plan,
        call: DecodeCall,
        prefixes: RunPrefixes,
        queues: Sequence[deque[Row]],
        most: int,
    ) -> None:
        """Makes room; nobody has joined.

        Args:
            executor: what runs it.
            plan: the run that it is of.
            call: its shape, and what its rows have in common.
            prefixes: the run's prefixes, encoded or not yet; they expect the waiting rows.
            queues: rows that wait, for each data shard; taken from the left.
            most: rows that may be under way on a data shard.
        """
        self._executor, self._plan, self._call, self._known = executor, plan, call, prefixes
        groups, self._length, rows, _ = call.shape
        self._most = most
        self._writer = PrefixWriter(executor, plan, prefixes, call.prefix_sizes, call.sampling.block_size)
        self._shards = [_Shard(min(most, rows // call.copies), groups, queue) for queue in queues]
        self._cache: PrefixCache = self._writer.room()
        self._state: DecodeState | None = None
        self._decoding: Decoding | None = None
        self._look: Look | None = None
        self._passes = np.zeros(len(queues), np.int64)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(G, P, B, U)."""
        return self._call.shape

    @property
    def busy(self) -> bool:
        """Whether a row is under way."""
        return any(shard.live for shard in self._shards)

    @property
    def waiting(self) -> bool:
        """Whether a row waits."""
        return any(shard.waiting for shard in self._shards)

    def under_way(self) -> list[list[Row]]:
        """The rows of each data shard that are under way."""
        return [[row for row in shard.rows if row is not None] for shard in self._shards]

    def give_up(self, row: Row) -> bool:
        """Frees the place of a row before it is done; whether it had one."""
        for shard in self._shards:
            for place in shard.live:
                if shard.rows[place] is row:
                    shard.rows[place] = None
                    shard.given_up.append(place)
                    return True
        return False

    def resize(self, shape: tuple[int, int, int, int], most: int) -> None:
        """Moves the rows that are under way into a batch of another size, with at least as many prefixes.

        Args:
            shape: its (G, P, B, U).
            most: rows that may be under way on a data shard.
        """
        assert self._state is not None
        placement, copies = self._executor.placement, self._call.copies
        places, half = shape[2] // copies, self.shape[2] // copies
        sources = []
        for shard in self._shards:
            live = shard.live
            for name, empty in (("rows", None), ("index", ()), ("blocks", 0), ("cached", 0)):
                kept = [getattr(shard, name)[place] for place in live]
                setattr(shard, name, kept + [empty] * (min(most, places) - len(kept)))
            shard.given_up = []
            shard.prefixes += [None] * (shape[0] - len(shard.prefixes))
            source = np.full((copies, places), -1, np.int32)
            for copy in range(copies):
                source[copy, : len(live)] = np.asarray(live, np.int32) + copy * half
            sources.append(source.reshape(-1))
        self._most = most
        self._state = move_rows(self._state, placement.put(sources), mesh=placement.mesh)
        if shape[0] > self.shape[0]:
            self._cache = more_prefixes(self._cache, groups=shape[0], mesh=placement.mesh)
        self._call = dataclasses.replace(self._call, shape=shape)

    def join(self, guests: Sequence[Sequence[deque[Row]]] = ()) -> None:
        """Gives free places to waiting rows that go with those under way.

        Args:
            guests: for each lane of shorter suffixes, those of the longest first, its queues by data shard.
        """
        for number, shard in enumerate(self._shards):
            shard.guests = [queues[number] for queues in guests]
        busy, joined = self.busy, [self._admit(shard) for shard in self._shards]
        if not any(joined) and not any(shard.given_up for shard in self._shards):
            return
        self._encode(joined)
        writes = [[write for _, of_row in places for write in of_row] for places in joined]
        self._cache = self._writer.write(self._cache, writes, self._boundaries)
        self._seat(joined)
        for number, places in enumerate(joined):
            for place, _ in places:
                row = self._shards[number].rows[place]
                assert row is not None
                self._known.release(number, row)
        rows = sum(map(len, joined))
        self._executor.counters.add(batches=int(not busy), prefix_hits=rows * self._call.copies if self._length else 0)

    def _admit(self, shard: _Shard) -> Joined:
        """Takes rows from a queue: the place of each, and the prefixes to write, with their places."""
        joined: Joined = []
        free = [place for place, row in enumerate(shard.rows) if row is None]
        while free and (queue := shard.waiting) is not None:
            row = queue[0]
            if shard.leader is None or row.settings != shard.leader.settings:
                if shard.live:
                    break  # they share a boundary and settings, so these go first
                shard.leader, shard.prefixes = row, [None] * len(shard.prefixes)
                self._decoding = None
            prefixes = row.named(self._plan.config.mask_id) if self._length else ()
            held = shard.hold(prefixes)
            if held is None:
                break
            queue.popleft()
            place = free.pop(0)
            shard.rows[place], shard.blocks[place] = row, 0
            shard.index[place] = tuple(index for index, _ in held) or (0,) * self._call.copies
            joined.append(
                (place, [(index, p) for p, (index, write) in zip(prefixes, held, strict=True) if write] if held else [])
            )
        return joined

    @property
    def _boundaries(self) -> list[int]:
        """The boundary of each data shard's rows, at most L - 1."""
        last = self._plan.config.num_layers
        return [clamp_boundary(shard.leader.boundary if shard.leader else 0, last) for shard in self._shards]

    def _encode(self, joined: Sequence[Joined]) -> None:
        """Encodes what is not known of the prefixes to write."""
        at, lacking = self._boundaries, []
        for number, places in enumerate(joined):
            of_shard = []
            for place, writes in places:
                missing = [prefix for _, prefix in writes if self._known.find(number, prefix, at[number]) is None]
                row = self._shards[number].rows[place]
                assert row is not None
                own = (row.namespace, row.prefix)
                begun = self._writer.beginning(own)[1] if own in missing else row.prefix_len
                self._shards[number].cached[place] = begun
                of_shard += missing
            lacking.append(of_shard)
        self._writer.encode(lacking, at)

    def _seat(self, joined: Sequence[Joined]) -> None:
        """Puts rows into their places."""
        placement, call = self._executor.placement, self._call
        fields, taken = [], []
        for shard, places in zip(self._shards, joined, strict=True):
            new = {place for place, _ in places}
            index = [shard.index[place] if place in new else (0,) * call.copies for place in range(len(shard.rows))]
            rows = [row if place in new else None for place, row in enumerate(shard.rows)]
            fields.append(call.rows(rows, [place for places in zip(*index, strict=True) for place in places]))
            changed = np.zeros(call.shape[2] // call.copies, bool)
            changed[[*new, *shard.given_up]] = True
            taken.append(np.tile(changed, call.copies))
            shard.given_up = []
        if self._decoding is None:
            self._decoding = placement.decoding([call.decoding(shard.leader) for shard in self._shards])
        rows_ = placement.rows(fields)
        if self._state is None:
            self._state = placement.state(rows_, **call.state_sizes)
        else:
            self._state = seat(self._state, rows_, placement.put(taken), mesh=placement.mesh)

    def dispatch(self, num_steps: int = NO_LIMIT) -> None:
        """Starts so many passes, or fewer: until all rows are done, or enough for those that wait to join."""
        block = min((shard.blocks[place] for shard in self._shards for place in shard.live), default=0)
        self._decode(next(stage for stage in self._call.stages if block < stage.stop_block), num_steps)

    def compile(self) -> None:
        """Calls each program that the rows under way may need, and makes no pass; then gives the rows up."""
        for stage in self._call.stages:
            self._decode(stage, 0)
        for shard in self._shards:
            shard.rows = [None] * len(shard.rows)

    def _decode(self, stage: Stage, num_steps: int) -> None:
        """Calls the program of a stage."""
        executor, call, stops = self._executor, self._call, []
        assert self._state is not None
        assert self._decoding is not None
        for shard in self._shards:
            free = call.shape[2] - call.copies * len(shard.live)  # padding included
            stops.append(free + max(1, len(shard.rows) // EAGER) * call.copies if shard.waiting else NO_LIMIT)
        if self.waiting and len(self._shards) > 1:  # no shard waits for long for the others
            num_steps = min(num_steps, self._plan.cache.interval(call.sampling))
        self._state = decode(
            executor.backbone,
            executor.params,
            self._cache,
            self._state,
            self._decoding,
            jnp.asarray(num_steps, jnp.int32),
            jnp.asarray(stage.stop_block, jnp.int32),
            executor.placement.put([np.asarray([stop], np.int32) for stop in stops]),
            mesh=executor.placement.mesh,
            **call.sizes(stage),
        )
        self._look = look(self._state, mesh=executor.placement.mesh)
        executor.counters.add(dispatches=1)

    def collect(self, shown: Callable[[Row], bool] | None = None) -> list[Seen]:
        """Waits for the last dispatch; rows that are done leave.

        Args:
            shown: which rows that are under way are of interest; None: none.

        Returns:
            How the rows stand that have left, and those of interest.
        """
        assert self._look is not None
        placement = self._executor.placement
        counts = np.asarray(self._look.counts).reshape(len(COUNTS), len(self._shards), -1)
        tokens = placement.read([self._look.tokens])
        passes = np.asarray(self._look.passes, np.int64)
        places = len(self._shards[0].rows)
        self._executor.counters.add(row_steps=places * int((passes - self._passes).sum()))
        self._passes = passes
        found = []
        for number, shard in enumerate(self._shards):
            for place in shard.live:
                row = shard.rows[place]
                assert row is not None
                of_row = dict(zip(COUNTS, map(int, counts[:, number, place]), strict=True))
                shard.blocks[place] = of_row["block"]
                if of_row["done"] or (shown is not None and shown(row)):
                    found.append(
                        Seen(row, of_row, tokens[number][0][place] if number in tokens else None, shard.cached[place])
                    )
                if of_row["done"]:
                    shard.rows[place] = None
        left = [seen for seen in found if seen.done]
        self._executor.counters.add(
            rows=len(left),
            tokens=sum(seen.row.request.sampling.gen_length for seen in left),
            forward_passes=sum(seen.counts["forward_passes"] for seen in left),
            passes_saved=sum(passes_saved(seen.row.request.sampling, seen.counts["block"]) for seen in left),
        )
        return found
