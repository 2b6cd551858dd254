"""Grouping: which prefix a request shares with others, and which rows run together. Pure functions of the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Literal

import numpy as np

from bicache_jax.core.buckets import length_bucket
from bicache_jax.core.config import PrefixDetection
from bicache_jax.core.layout import suffix_length
from bicache_jax.core.types import Request

DEEPER = 1.25
"""A longer prefix that only some rows of a group share gets an encoding of its own from this ratio of lengths on."""

TOKENS_PER_BATCH = 4096
"""Tokens that a refresh step runs at once by default: enough for matmuls at full speed, few enough for any memory."""
MOST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Row:
    """One response to make.

    Attributes:
        request: the request.
        sample: which of its samples.
        prefix_len: P.
        ratio: r.
        boundary: b of the row by itself.
    """

    request: Request
    sample: int
    prefix_len: int
    ratio: int
    boundary: int

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens of the prefix."""
        return self.request.prompt_ids[: self.prefix_len]

    @property
    def suffix_len(self) -> int:
        """U."""
        return suffix_length(self.request, self.prefix_len)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        rows: sorted by prefix.
        prefixes: distinct prefixes, in the order of the rows.
        prefix_index: prefix of each row; under guidance then of each row's twin, a prefix of masks.
        boundary: b of the batch.
    """

    rows: tuple[Row, ...]
    prefixes: tuple[tuple[int, ...], ...]
    prefix_index: tuple[int, ...]
    boundary: int

    @property
    def guided(self) -> bool:
        """Whether each row has a twin without its prompt."""
        return bool(self.rows) and self.rows[0].request.sampling.guided


def prefix_ratio(prefix_len: int, total: int) -> int:
    """Percent r = round(100 P / (P + U)), Python's `round`.

    Args:
        prefix_len: P.
        total: P + U, prompt and response.
    """
    return round(100 * prefix_len / total)


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def detect_prefixes(
    requests: Sequence[Request], *, min_prefix: int, min_suffix: int, detection: PrefixDetection = "auto"
) -> list[int]:
    """Finds the shared prefix of each request.

    A given `prefix_len` is kept. A request for several samples shares its whole prompt with itself. For the others,
    prompts are sorted, and the common prefixes of neighbours form a tree. From its root down, a request takes the
    first prefix of at least `min_prefix` tokens that it shares with another, and then a longer one each time that is at
    least `DEEPER` times as long: a document below a common instruction is worth its own encoding, two questions that
    happen to begin alike are not. What a request gets depends on the set of prompts, never on their order.

    Args:
        requests: all requests of a run.
        min_prefix: shortest prefix worth a cache.
        min_suffix: prompt tokens that must stay out of the prefix (1 for families that shift logits).
        detection: `messages` leaves out what requests share with each other, and `off` also the prefixes that follow
            from messages and from several samples: a prefix is then a function of its request alone.

    Returns:
        Prefix length of each request, 0 for none.
    """
    lengths = [0] * len(requests)
    open_places = []
    for place, request in enumerate(requests):
        most = max(0, len(request.prompt_ids) - min_suffix)
        if request.prefix_len is not None and not (detection == "off" and request.prefix_from_messages):
            lengths[place] = min(request.prefix_len, most)
        elif request.n > 1 and detection != "off":
            lengths[place] = most
        elif detection == "auto":
            open_places.append(place)
    # As big-endian bytes, prompts compare at the speed of memory; ids are never negative.
    prompts = {place: np.asarray(requests[place].prompt_ids, ">i4") for place in open_places}
    order = sorted(open_places, key=lambda place: prompts[place].tobytes())
    ends = {place: max(0, len(prompts[place]) - min_suffix) for place in order}
    common = [_shared(prompts[a][: ends[a]], prompts[b][: ends[b]]) for a, b in pairwise(order)]
    for place, shared in zip(order, _worth_caching(common, min_prefix) if order else [], strict=True):
        lengths[place] = shared
    return lengths


def _worth_caching(common: Sequence[int], min_prefix: int) -> list[int]:
    """The prefix that each of the sorted prompts takes, given what neighbours share.

    The common prefixes are the inner nodes of a tree, one pass over the neighbours builds it: `open_nodes` are those
    that the prompt at hand lies below, from the root down.
    """
    depths: list[int] = []
    parents: list[int] = []
    leaves: list[int] = []  # the node above each prompt
    open_nodes: list[int] = []

    def node(depth: int) -> int:
        depths.append(depth)
        parents.append(-1)
        return len(depths) - 1

    def enter(depth: int) -> None:
        entered = node(depth)
        if open_nodes:
            parents[entered] = open_nodes[-1]
        open_nodes.append(entered)

    for depth in [*common, 0]:  # what a prompt shares with the next one
        if not open_nodes or depths[open_nodes[-1]] < depth:
            enter(depth)
        leaves.append(open_nodes[-1])
        left = -1
        while open_nodes and depths[open_nodes[-1]] > depth:
            left = open_nodes.pop()
        if left >= 0 and (not open_nodes or depths[open_nodes[-1]] < depth):
            enter(depth)
        if left >= 0:
            parents[left] = open_nodes[-1]
    accepted = [0] * len(depths)
    for place in sorted(range(len(depths)), key=lambda place: depths[place]):  # parents come first
        above = accepted[parents[place]] if parents[place] >= 0 else 0
        accepted[place] = depths[place] if depths[place] >= max(min_prefix, above * DEEPER) else above
    return [accepted[leaf] for leaf in leaves]


def default_rows(prefix_len: int, suffix_len: int) -> int:
    """Rows of a batch when the user names no number: as many as `TOKENS_PER_BATCH` holds, 1 to `MOST_ROWS`."""
    return max(1, min(MOST_ROWS, TOKENS_PER_BATCH // max(1, prefix_len + suffix_len)))


def _key(row: Row, batch_boundary: Literal["own", "min"]) -> tuple[object, ...]:
    """What rows of a batch must have in common."""
    sampling = row.request.sampling
    return (
        row.boundary if batch_boundary == "own" else -1,
        length_bucket(row.prefix_len),
        length_bucket(row.suffix_len),
        *(str(value) for value in dataclasses.astuple(dataclasses.replace(sampling, seed=0))),
    )


def plan_batches(
    rows: Sequence[Row],
    *,
    mask_id: int,
    batch_size: int | None = None,
    batch_boundary: Literal["own", "min"] = "own",
    rows_of: Callable[[int, int], int] | None = None,
) -> list[Batch]:
    """Puts rows into batches.

    Rows of a batch share boundary, decoding settings and shape buckets; prefixes mix freely. Within such a class rows
    are sorted by prefix, so that a prefix's rows are neighbours and its batches follow each other.

    Args:
        rows: what to run.
        mask_id: the mask token, of which the prefixes of twins consist.
        batch_size: most rows of a batch; None: `rows_of` their buckets.
        batch_boundary: `own` keeps boundaries apart; `min` merges rows of all boundaries at the smallest of the batch.
        rows_of: most rows by buckets of P and U; None: `default_rows`.

    Returns:
        Batches, each row in exactly one.
    """

    def order(row: Row) -> tuple[object, ...]:
        return (*_key(row, batch_boundary), row.prefix, row.request.index, row.sample)

    batches = []
    for _, members in groupby(sorted(rows, key=order), key=lambda row: _key(row, batch_boundary)):
        todo = list(members)
        copies = 1 + todo[0].request.sampling.guided
        usual = rows_of or default_rows
        planned = usual(*(copies * length_bucket(size) for size in (todo[0].prefix_len, todo[0].suffix_len)))
        size = batch_size or planned
        batches += [_batch(todo[begin : begin + size], mask_id) for begin in range(0, len(todo), size)]
    return batches


def _batch(rows: Sequence[Row], mask_id: int) -> Batch:
    used = [row.prefix for row in rows]
    if rows[0].request.sampling.guided:
        used += [(mask_id,) * row.prefix_len for row in rows]
    prefixes = tuple(dict.fromkeys(used))
    place = {prefix: index for index, prefix in enumerate(prefixes)}
    return Batch(
        rows=tuple(rows),
        prefixes=prefixes,
        prefix_index=tuple(place[prefix] for prefix in used),
        boundary=min(row.boundary for row in rows),
    )
