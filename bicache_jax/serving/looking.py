"""Looks at texts: rows that share a refresh, in the rounds of a plan. What they find goes to their requests."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.buckets import count_bucket, width_bucket
from bicache_jax.core.cache import PrefixCache
from bicache_jax.core.config import REFRESH_INTERVAL, CacheConfig
from bicache_jax.core.layout import lay_out
from bicache_jax.core.masks import Masks
from bicache_jax.core.types import Request
from bicache_jax.decoding.likelihood import Scored
from bicache_jax.serving.executor import Executor
from bicache_jax.serving.grouping import Program, Row
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.prefix_writer import PrefixWriter
from bicache_jax.serving.rounds import Round
from bicache_jax.serving.run_prefixes import RunPrefixes
from bicache_jax.serving.score_requests import ScoreRequest


@dataclasses.dataclass(eq=False)
class Part:
    """A text, or a block of one, behind what comes before it.

    Attributes:
        request: what comes before it as a prompt, and its length as a response.
        tokens: its tokens.
        masks: how it is masked.
        log_p: of its masked tokens, under each distinct mask.
        top: whether all of them are the most probable ones.
    """

    request: Request
    tokens: tuple[int, ...]
    masks: Masks

    def __post_init__(self) -> None:
        size = len(self.masks.distinct)
        self.log_p, self.top = np.full(size, np.nan), np.zeros(size, bool)


@dataclasses.dataclass(eq=False)
class Pending:
    """A request under way.

    Attributes:
        request: the request.
        prefix_len: P, before it is cut to whole blocks.
        ratio: r, with the longest text, so that all texts have one boundary.
        texts: the parts of each text.
        rows: rows that are not done.
        row: a row of it, for what the score says of its prefix.
        cached: tokens of that prefix that were encoded already.
    """

    request: ScoreRequest
    prefix_len: int
    ratio: int
    texts: list[list[Part]] = dataclasses.field(default_factory=list)
    rows: int = 0
    row: Row | None = None
    cached: int | None = None


def _room(looks: int) -> int:
    """Looks that a program has room for: few sizes, since how many are made is traced."""
    return max(REFRESH_INTERVAL, 1 << (looks - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class LookRow(Row):
    """Some looks at a part of a text, which share a refresh.

    Attributes:
        part: the part.
        pending: its request.
        first: the first of its masks that the row looks at.
        looks: how many.
    """

    part: Part = None  # type: ignore[assignment]
    pending: Pending = None  # type: ignore[assignment]
    first: int = 0
    looks: int = 0

    @property
    def settings(self) -> tuple[object, ...]:
        """What rows that run together have in common beside their program: the boundary, and about as many looks."""
        return self.boundary, count_bucket(self.looks)

    def program(self, cache: CacheConfig) -> Program:
        """What rows of one program have in common."""
        return Program(*self.buckets, (width_bucket(self.request.sampling.block_size), _room(self.looks)))


def _looks(row: Row) -> int:
    assert isinstance(row, LookRow)
    return row.looks


class Looking:
    """The rounds of a plan, one after the other; the host reads one while the devices run the next."""

    def __init__(self, executor: Executor, plan: Plan, known: RunPrefixes) -> None:
        """Nothing is encoded yet.

        Args:
            executor: the model on its devices.
            plan: a plan of `LookRow`s.
            known: its prefixes.
        """
        self._executor, self._plan, self._known = executor, plan, known
        self._held: tuple[object, PrefixCache] | None = None
        for batches in plan.rounds:
            for shard, batch in enumerate(batches):
                for row in batch.rows:
                    known.expect(shard, row)

    def run(self) -> Iterator[Pending]:
        """Runs all rounds; yields the requests that are done."""
        under_way: list[tuple[Round, Scored]] = []
        for batches in self._plan.rounds:
            began = time.perf_counter()
            if under_way and not self._holds(batches):
                yield from self._collect(*under_way.pop())  # the cache that it reads makes room for another
            found = self._dispatch(batches)
            self._executor.counters.add(seconds=time.perf_counter() - began)
            if under_way:
                yield from self._collect(*under_way.pop())
            under_way.append((batches, found))
        for last in under_way:
            yield from self._collect(*last)

    def _key(self, batches: Round) -> object:
        groups, length, _, _ = self._plan.shape(*batches)
        return groups, length, tuple((batch.prefixes, batch.boundary) for batch in batches)

    def _holds(self, batches: Round) -> bool:
        return self._held is not None and self._held[0] == self._key(batches)

    def _dispatch(self, batches: Round) -> Scored:
        """Starts a round."""
        plan, executor, config = self._plan, self._executor, self._plan.config
        _, length, num_rows, suffix = plan.shape(*batches)
        leader = next(batch.rows[0] for batch in batches if batch.rows)
        assert isinstance(leader, LookRow)
        block = leader.request.sampling.block_size
        boundaries = [clamp_boundary(batch.boundary, config.num_layers) for batch in batches]
        cache = self._prefixes(batches, boundaries, block)
        width, room = width_bucket(block), _room(leader.looks)
        looks = [max((_looks(row) for row in batch.rows), default=1) for batch in batches]
        fields, targets, masked, passes = [], [], [], 0
        for batch in batches:
            entries = [(row.request, row.sample, row.prefix_len) for row in batch.rows]
            fields.append(lay_out(entries, batch.prefix_index, config, num_rows=num_rows, length=suffix))
            tokens = np.full((num_rows, width), config.mask_id, np.int32)
            hidden = np.zeros((num_rows, room, width), bool)
            for place, row in enumerate(batch.rows):
                assert isinstance(row, LookRow)
                own = row.part.masks.distinct[row.first : row.first + row.looks]
                tokens[place, : own.shape[1]] = row.part.tokens
                hidden[place, : own.shape[0], : own.shape[1]] = own
                passes += row.looks
            targets.append(tokens)
            masked.append(hidden)
        found = executor.score(
            cache, fields, targets, masked, boundaries, looks, block, deep_layers=plan.buffers.deep if length else 0
        )
        for shard, batch in enumerate(batches):
            for row in batch.rows:
                self._known.release(shard, row)
        rows = sum(len(batch.rows) for batch in batches)
        executor.counters.add(
            batches=1,
            dispatches=1,
            forward_passes=passes,
            row_steps=sum(looks) * num_rows,
            prefix_hits=rows if length else 0,
        )
        return found

    def _prefixes(self, batches: Round, boundaries: Sequence[int], block: int) -> PrefixCache:
        """The cache of a round's prefixes: the last round's, where it is the same."""
        plan, known = self._plan, self._known
        if self._holds(batches):
            assert self._held is not None
            self._note_cached(batches, [set() for _ in batches], None)
            return self._held[1]
        self._held = None
        groups, length, _, _ = plan.shape(*batches)
        sizes = {
            "groups": groups,
            "length": length,
            "layers": plan.buffers.shallow,
            "dtype": plan.dtype,
            "cache_dtype": plan.cache.cache_dtype,
        }
        writer = PrefixWriter(self._executor, plan, known, sizes, block)
        writes, lacking = [], []
        for shard, batch in enumerate(batches):
            space = batch.rows[0].namespace if batch.rows else ""
            named = [(place, (space, prefix)) for place, prefix in enumerate(batch.prefixes) if prefix]
            writes.append(named)
            lacking.append([one for _, one in named if known.find(shard, one, boundaries[shard]) is None])
        self._note_cached(batches, [{prefix for _, prefix in of_shard} for of_shard in lacking], writer)
        writer.encode(lacking, boundaries)
        cache = writer.write(writer.room(), writes, boundaries)
        self._held = self._key(batches), cache
        return cache

    def _note_cached(
        self, batches: Round, lacking: Sequence[set[tuple[int, ...]]], writer: PrefixWriter | None
    ) -> None:
        """Remembers how much of each request's prefix is there without it: all, but for the first that needs it."""
        for batch, missing in zip(batches, lacking, strict=True):
            for row in batch.rows:
                assert isinstance(row, LookRow)
                if row.pending.cached is not None or len(row.request.prompt_ids) > len(row.pending.request.prompt_ids):
                    continue  # noted, or a later block, before which there are tokens of the text
                if writer is not None and row.prefix in missing:
                    missing.remove(row.prefix)
                    row.pending.cached = writer.beginning((row.namespace, row.prefix))[1]
                else:
                    row.pending.cached = row.prefix_len

    def _collect(self, batches: Round, found: Scored) -> Iterator[Pending]:
        """Waits for a round; yields the requests that are done with it."""
        began = time.perf_counter()
        log_p, top = (np.asarray(part).reshape(len(batches), -1, part.shape[1]) for part in found)
        self._executor.counters.add(seconds=time.perf_counter() - began)
        for shard, batch in enumerate(batches):
            for place, row in enumerate(batch.rows):
                assert isinstance(row, LookRow)
                looks = slice(row.first, row.first + row.looks)
                row.part.log_p[looks] = log_p[shard, place, : row.looks]
                row.part.top[looks] = top[shard, place, : row.looks]
                row.pending.rows -= 1
                if not row.pending.rows:
                    yield row.pending
