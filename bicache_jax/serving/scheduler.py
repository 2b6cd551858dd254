"""The loop over lanes: rows are submitted, join lanes, and leave with their results.

    submit -> open a lane -> join -> dispatch -> collect

A job submits all its rows and drains the scheduler; a server submits as requests come. Rows that need the same programs
wait in one queue a data shard, and a queue has one lane at a time.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import islice, takewhile

from bicache_jax.core.buckets import count_bucket
from bicache_jax.core.types import Result
from bicache_jax.serving.executor import Executor
from bicache_jax.serving.frames import Frames
from bicache_jax.serving.grouping import Named, Program, Row
from bicache_jax.serving.lane import Lane, Seen
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.programs import DecodeCall
from bicache_jax.serving.run_prefixes import RunPrefixes


def most_prefixes(rows: Sequence[Row], window: int, mask_id: int) -> int:
    """The most prefixes that as many neighbours as fit into a window run over."""
    held: Counter[Named] = Counter()
    most = 0
    for number, row in enumerate(rows):
        held.update(row.named(mask_id))
        if number >= window:
            for prefix in rows[number - window].named(mask_id):
                held[prefix] -= 1
                if not held[prefix]:
                    del held[prefix]
        most = max(most, len(held))
    return most


def _goes_with(one: Row | None, other: Row) -> bool:
    return one is not None and one.settings == other.settings


class _Class:
    """Rows that may share a lane, waiting and under way.

    Attributes:
        program: what they have in common.
        queues: those that wait, by data shard.
        lane: their lane, if one is open.
        most: most rows of it on a data shard.
        turn: when it had its last turn.
        since: when the first of them began to wait for a lane.
        closing: whether nobody joins the lane any more.
    """

    def __init__(self, program: Program, shards: int, since: float) -> None:
        self.program = program
        self.queues: list[deque[Row]] = [deque() for _ in range(shards)]
        self.lane: Lane | None = None
        self.most, self.turn, self.since, self.closing = 1, 0, since, False

    @property
    def busy(self) -> bool:
        return self.lane is not None and self.lane.busy

    @property
    def waiting(self) -> bool:
        return any(self.queues)

    def put(self, row: Row, shard: int) -> None:
        """Lets a row wait, in front of those of lower priority."""
        queue = self.queues[shard]
        place = len(queue)
        while place and queue[place - 1].priority < row.priority:
            place -= 1
        queue.insert(place, row)

    def together(self, limit: int | None = None) -> list[list[Row]]:
        """On each data shard, rows that could be under way at once: those that are, and those that may join them.

        Args:
            limit: most of those that may join; None: all.
        """
        under_way = self.lane.under_way() if self.lane is not None else [[] for _ in self.queues]
        found = []
        for rows, queue in zip(under_way, self.queues, strict=True):
            first = next(iter(rows or queue), None)
            found.append([*rows, *islice(takewhile(partial(_goes_with, first), queue), limit)])
        return found


class Scheduler:
    """Runs rows on the devices."""

    def __init__(
        self,
        executor: Executor,
        plan: Plan,
        prefixes: RunPrefixes,
        places: Callable[[Row], int],
        *,
        lanes: int = 1,
        patience: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing waits yet.

        Args:
            executor: the model on its devices.
            plan: sizes of the caches, and how prefixes are reused.
            prefixes: the prefixes of the rows to come.
            places: most rows of the batch that a row is in.
            lanes: most lanes that are open at once; they take turns. With one, rows of other settings than those under
                way wait in its queue.
            patience: seconds after which nobody joins the oldest lane any more, if others wait for one.
            clock: tells the time.
        """
        self._executor, self._plan, self._prefixes, self._places = executor, plan, prefixes, places
        self._lanes, self._patience, self._clock = lanes, patience, clock
        self._classes: dict[Hashable, _Class] = {}
        self._turns = 0

    def submit(self, row: Row, shard: int = 0) -> None:
        """Lets a row wait for its turn on a data shard."""
        program = row.program(self._plan.cache)
        key: Hashable = (program, row.settings) if self._lanes > 1 else program
        of_row = self._classes.get(key)
        if of_row is None:
            of_row = self._classes[key] = _Class(program, self._executor.placement.shards, self._clock())
        of_row.most = max(of_row.most, self._places(row))
        of_row.put(row, shard)
        self._prefixes.expect(shard, row)

    def cancel(self, row: Row) -> bool:
        """Gives up a row that waits or is under way; whether there was one."""
        for of_row in self._classes.values():
            for shard, queue in enumerate(of_row.queues):
                for place, waiting in enumerate(queue):
                    if waiting is row:
                        del queue[place]
                        self._prefixes.release(shard, row)
                        return True
            if of_row.lane is not None and of_row.lane.give_up(row):
                return True
        return False

    def load(self) -> list[int]:
        """Rows that wait or are under way, by data shard."""
        found = [0] * self._executor.placement.shards
        for of_row in self._classes.values():
            under_way = of_row.lane.under_way() if of_row.lane is not None else [[] for _ in found]
            for shard, (queue, rows) in enumerate(zip(of_row.queues, under_way, strict=True)):
                found[shard] += len(queue) + len(rows)
        return found

    def run(
        self,
        frames: Frames | None = None,
        *,
        shown: Callable[[Row], bool] = lambda row: True,
        between: Callable[[], bool] = lambda: True,
    ) -> Iterator[Seen]:
        """Runs until nothing waits and nothing is under way.

        Args:
            frames: how often to look at rows that are under way; None: only when they are done.
            shown: which of them to look at.
            between: called between dispatches; may submit and cancel rows. False ends the run at once.

        Yields:
            How rows stand; each once done, after looks on its way.
        """
        seen: list[Seen] | None = None
        counters, clock = self._executor.counters, time.perf_counter
        while between():
            began = clock()
            lane = self._next()
            if lane is None:
                break
            lane.dispatch(**({"num_steps": frames.steps} if frames else {}))
            counters.add(seconds=clock() - began)
            if seen is not None:
                yield from seen  # while the devices work on
                if frames:
                    frames.shown()
            began = clock()
            seen = lane.collect(shown if frames else None)
            counters.add(seconds=clock() - began)
        yield from seen or ()

    def compile(self) -> list[tuple[int, int, int, int]]:
        """Calls each program that draining would call, without a step; returns the shapes of the lanes."""
        shapes = []
        while (lane := self._next()) is not None:
            lane.compile()
            shapes.append(lane.shape)
        return shapes

    def _next(self) -> Lane | None:
        """The lane whose turn it is, with all that may join it."""
        for key, one in list(self._classes.items()):
            if not one.busy and (one.closing or not one.waiting):
                one.lane, one.closing, one.since = None, False, self._clock()
                if not one.waiting:
                    del self._classes[key]
        self._make_room()
        # The longest first: when they become few, shorter ones fill their lane.
        for key, one in sorted(self._classes.items(), key=lambda item: (item[1].turn, -item[1].program.suffix)):
            if one.lane is None and self._open >= self._lanes:
                continue
            self._turns += 1
            one.turn, one.since = self._turns, math.inf
            if not one.closing:
                self._fit(key, one)
            assert one.lane is not None
            if not one.closing:
                one.lane.join(self._guests(one))
            return one.lane
        return None

    def _guests(self, one: _Class) -> list[list[deque[Row]]]:
        """The queues of the classes whose rows may take places that a class has no use for, longest suffixes first."""
        shorter = [other for other in self._classes.values() if other.waiting and one.program.holds(other.program)]
        return [other.queues for other in sorted(shorter, key=lambda other: other.program.suffix, reverse=True)]

    @property
    def _open(self) -> int:
        return sum(one.lane is not None for one in self._classes.values())

    def _make_room(self) -> None:
        """Closes the lane that has been open longest, where others have waited too long for one."""
        now = self._clock()
        if self._open < self._lanes or any(one.closing for one in self._classes.values()):
            return
        if any(one.lane is None and now - one.since > self._patience for one in self._classes.values()):
            next(one for one in self._classes.values() if one.lane is not None).closing = True

    def _fit(self, key: Hashable, one: _Class) -> None:
        """Opens a lane for a class, or gives the one it has the size that is needed."""
        lane = one.lane
        # Every turn comes here, so it looks at no more of what waits than a lane could take, where that stays as it is.
        if (
            lane is not None
            and lane.busy
            and lane.shape[2] // 2 < _num_rows(one, one.together(one.most)) <= lane.shape[2]
        ):
            return
        call = self._call(one)
        rows = call.shape[2]
        known = (key, call.shape) in self._executor.shapes
        if lane is not None and lane.busy:
            groups, prefix, _, suffix = lane.shape  # the first of its rows may be a guest
            shape = (max(call.shape[0], groups), prefix, rows, suffix)
            if rows > lane.shape[2] or (2 * rows <= lane.shape[2] and (key, shape) in self._executor.shapes):
                lane.resize(shape, one.most)
        elif lane is None or not _suits(lane, call, known=known):
            one.lane = lane = None  # its memory goes before that of the next one comes
            one.lane = lane = Lane(self._executor, self._plan, call, self._prefixes, one.queues, one.most)
        self._executor.shapes.add((key, lane.shape))

    def _call(self, one: _Class) -> DecodeCall:
        """The program for a class: as many places as the rows need that go together, and may have."""
        together = [rows for rows in one.together() if rows]
        first, mask_id = together[0][0], self._plan.config.mask_id
        rows = _num_rows(one, together)
        places = rows // (1 + first.request.sampling.guided)
        # One more than there are places: rows of the next prefix join while the last ones of this are under way.
        groups = max(most_prefixes(of_shard, places + 1, mask_id) for of_shard in together)
        shape = (
            min(count_bucket(groups), rows),
            self._plan.prefix_bucket(first.prefix_len),
            rows,
            self._plan.suffix_bucket(first.suffix_len),
        )
        return DecodeCall(self._plan, shape, first.request.sampling)


def _num_rows(one: _Class, together: Sequence[Sequence[Row]]) -> int:
    """B for rows that could be under way at once, by data shard; twins are rows."""
    first = next(rows[0] for rows in together if rows)
    return count_bucket(min(one.most, max(map(len, together)))) * (1 + first.request.sampling.guided)


def _suits(lane: Lane, call: DecodeCall, *, known: bool) -> bool:
    """Whether what waits may as well run in an empty lane, rather than in one of its own size.

    Args:
        lane: the lane.
        call: the program of its own size.
        known: whether that one has run before; compiling another is worth while where it halves the work.
    """
    groups, _, rows, _ = lane.shape
    if call.shape[0] > groups or call.shape[2] > rows:
        return False
    return call.shape[2] == rows or (not known and 2 * call.shape[2] > rows)


def result_of(executor: Executor, seen: Seen) -> Result | None:
    """What there is to say of a row; None: nothing yet, or another process says it."""
    return None if seen.tokens is None else executor.result(seen.row, seen.counts, seen.tokens, seen.cached)


def scheduled(executor: Executor, plan: Plan, prefixes: RunPrefixes) -> Scheduler:
    """A scheduler with all rows of a plan, in its order."""
    most: dict[Program, int] = {}
    for batch in plan.batches:
        key = batch.rows[0].program(plan.cache)
        most[key] = max(most.get(key, 1), len(batch.rows))
    scheduler = Scheduler(executor, plan, prefixes, lambda row: most[row.program(plan.cache)])
    for batches in plan.rounds:
        for shard, batch in enumerate(batches):
            for row in batch.rows:
                scheduler.submit(row, shard)
    return scheduler
