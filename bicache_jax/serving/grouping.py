"""Grouping: which prefix a request shares with others, and which rows run together. Pure functions on the host."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from bicache_jax.core.buckets import length_bucket, width_bucket
from bicache_jax.core.config import CacheConfig, PrefixDetection
from bicache_jax.core.layout import suffix_length
from bicache_jax.core.types import Request

DEEPER = 1.25
"""A longer prefix that only some rows of a group share gets its own encoding if it is at least this much longer."""

TOKENS_PER_BATCH = 4096
"""Default number of tokens in a refresh step: enough for fast matmuls, few enough to fit into memory."""
MOST_ROWS = 64


Named = tuple[str, tuple[int, ...]]
"""A prefix by its namespace and its tokens."""


class Program(NamedTuple):
    """What the rows of a program have in common.

    Attributes:
        prefix: P in buckets.
        suffix: U in buckets.
        sizes: its other sizes.
    """

    prefix: int
    suffix: int
    sizes: tuple[int, ...]

    def holds(self, other: Program) -> bool:
        """Whether rows of a program of shorter suffixes may run in this one, as padding allows."""
        return self.suffix > other.suffix and (self.prefix, self.sizes) == (other.prefix, other.sizes)


@dataclasses.dataclass(frozen=True)
class Row:
    """One response to make.

    Attributes:
        request: the request.
        sample: index of the sample.
        prefix_len: P.
        ratio: r.
        boundary: the row's b: its own, or that of the batch it is merged into.
        priority: rows of higher priority join first.
        namespace: its prefix is only shared with rows of the same.
        filled: masks behind the response that complete its last block.
    """

    request: Request
    sample: int
    prefix_len: int
    ratio: int
    boundary: int
    priority: int = 0
    namespace: str = ""
    filled: int = 0

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens of the prefix."""
        return self.request.prompt_ids[: self.prefix_len]

    def prefixes(self, mask_id: int) -> tuple[tuple[int, ...], ...]:
        """The prefixes that it runs over: its own, and under guidance its twin's, as many masks."""
        own = self.prefix
        return (own, (mask_id,) * len(own)) if self.request.sampling.guided else (own,)

    def named(self, mask_id: int) -> tuple[Named, ...]:
        """`prefixes`, by what they are kept and shared under."""
        return tuple((self.namespace, prefix) for prefix in self.prefixes(mask_id))

    @property
    def suffix_len(self) -> int:
        """U."""
        return suffix_length(self.request, self.prefix_len) + self.filled

    @property
    def buckets(self) -> tuple[int, int]:
        """P and U in buckets."""
        return length_bucket(self.prefix_len), length_bucket(self.suffix_len)

    @functools.cached_property
    def settings(self) -> tuple[object, ...]:
        """What rows that run together have in common beside their program: the boundary and how tokens are decided.

        Blocks are of one size and have as many steps, the last one too; how many there are is each row's own.
        """
        sampling = self.request.sampling
        rest = dataclasses.replace(sampling, seed=0, gen_length=1, block_length=1, steps=None, steps_per_block=None)
        return (
            self.boundary,
            sampling.block_size,
            sampling.last_block_size,
            sampling.block_steps,
            *(str(value) for value in dataclasses.astuple(rest)),
        )

    def program(self, cache: CacheConfig) -> Program:
        """What rows must have in common to run in the same program, in batches of a round or one after the other."""
        sampling = self.request.sampling
        shape = (
            width_bucket(sampling.block_size),
            length_bucket(sampling.block_steps),
            len(sampling.suppress_tokens),
            sampling.guided,
        )
        blocks = () if cache.block_cache == "off" else (sampling.block_size, sampling.gen_length)
        return Program(*self.buckets, (*shape, *blocks))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that run together.

    Attributes:
        rows: sorted by prefix.
        prefixes: distinct prefixes, in the order of the rows.
        prefix_index: prefix of each row; with guidance followed by that of each row's twin, a prefix of masks.
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
    requests: Sequence[Request],
    *,
    min_prefix: int,
    min_suffix: int,
    detection: PrefixDetection = "auto",
    added: Collection[tuple[int, ...]] = (),
) -> list[int]:
    """Finds the shared prefix of each request.

    What stands in front of a template's first hole counts as its prompt. A given `prefix_len` is kept. A request for
    several samples uses its whole prompt as prefix, and one whose prompt begins with an added prefix the longest of
    these. The other prompts are sorted, and the common prefixes of neighbours form a tree. Starting at the root, a
    request takes the first prefix of at least `min_prefix` tokens that it shares with another request, and then each
    longer one that is at least `DEEPER` times as long. So a document after a common instruction gets its own encoding,
    and two questions that happen to begin with the same words do not. The result depends on the set of prompts, not on
    their order.

    Args:
        requests: all requests of a run.
        min_prefix: shortest prefix that is cached.
        min_suffix: prompt tokens that must stay out of the prefix (1 for families that shift logits).
        detection: `messages` ignores what requests share with each other; `off` also ignores prefixes that follow from
            messages or from several samples, so a prefix depends only on its own request.
        added: prefixes of which a request takes the longest that its prompt begins with.

    Returns:
        Prefix length of each request, 0 for none.
    """
    lengths = [0] * len(requests)
    known, sizes = set(added), sorted({len(prefix) for prefix in added}, reverse=True)
    undecided = []
    for index, request in enumerate(requests):
        most = max(0, request.lead - min_suffix)
        if request.prefix_len is not None and not (detection == "off" and request.prefix_from_messages):
            lengths[index] = min(request.prefix_len, most)
        elif request.n > 1 and detection != "off":
            lengths[index] = most
        elif longest := next((size for size in sizes if size <= most and request.prompt_ids[:size] in known), 0):
            lengths[index] = longest
        elif detection == "auto":
            undecided.append(index)
    # Sorting big-endian bytes is fast and gives the same order, since ids are never negative.
    prompts = {index: np.asarray(requests[index].prompt_ids[: requests[index].lead], ">i4") for index in undecided}
    order = sorted(undecided, key=lambda index: prompts[index].tobytes())
    ends = {index: max(0, len(prompts[index]) - min_suffix) for index in order}
    common = [_shared(prompts[a][: ends[a]], prompts[b][: ends[b]]) for a, b in pairwise(order)]
    for index, shared in zip(order, _worth_caching(common, min_prefix) if order else [], strict=True):
        lengths[index] = shared
    return lengths


def _worth_caching(common: Sequence[int], min_prefix: int) -> list[int]:
    """Prefix length of each of the sorted prompts, from the lengths that neighbours share.

    The common prefixes are the inner nodes of a tree. One pass over the neighbours builds it: `open_nodes` are the
    ancestors of the current prompt, from the root down.
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
    for index in sorted(range(len(depths)), key=lambda index: depths[index]):  # parents come first
        above = accepted[parents[index]] if parents[index] >= 0 else 0
        accepted[index] = depths[index] if depths[index] >= max(min_prefix, above * DEEPER) else above
    return [accepted[leaf] for leaf in leaves]


def default_rows(prefix_len: int, suffix_len: int) -> int:
    """Default number of rows in a batch: as many as fit into `TOKENS_PER_BATCH`, from 1 to `MOST_ROWS`."""
    return max(1, min(MOST_ROWS, TOKENS_PER_BATCH // max(1, prefix_len + suffix_len)))


def plan_batches(
    rows: Sequence[Row],
    *,
    mask_id: int,
    cache: CacheConfig,
    batch_size: int | None = None,
    rows_of: Callable[[int, int], int] | None = None,
) -> list[Batch]:
    """Puts rows into batches.

    Rows of a batch share boundary, decoding settings and program, but may have different prefixes. Rows that can
    share a batch are sorted by prefix, so that rows of the same prefix are neighbours and their batches consecutive.

    Args:
        rows: the rows to run.
        mask_id: the mask token; prefixes of twins consist of it.
        cache: `batch_boundary` `own` separates rows by boundary; `min` merges them and uses the smallest of the batch.
        batch_size: largest number of rows in a batch; None: from `rows_of`.
        rows_of: largest number of rows for buckets of P and U; None: `default_rows`.

    Returns:
        Batches, each row in exactly one.
    """

    def together(row: Row) -> tuple[object, ...]:
        boundary, *settings = row.settings
        return (boundary if cache.batch_boundary == "own" else -1, row.program(cache), *settings)

    def order(row: Row) -> tuple[object, ...]:
        return (*together(row), row.prefix, row.request.index, row.sample)

    batches = []
    for _, members in groupby(sorted(rows, key=order), key=together):
        todo = list(members)
        copies = 1 + todo[0].request.sampling.guided
        usual = rows_of or default_rows
        planned = usual(*(copies * size for size in todo[0].buckets))
        size = batch_size or planned
        for begin in range(0, len(todo), size):
            chosen = todo[begin : begin + size]
            boundary = min(row.boundary for row in chosen)
            batches.append(make_batch([dataclasses.replace(row, boundary=boundary) for row in chosen], mask_id))
    return batches


def make_batch(rows: Sequence[Row], mask_id: int) -> Batch:
    """The batch of rows that agree in their settings; `mask_id` as in `plan_batches`."""
    of_row = [row.prefixes(mask_id) for row in rows]
    used = [prefix for prefixes in zip(*of_row, strict=True) for prefix in prefixes]
    prefixes = tuple(dict.fromkeys(used))
    index_of = {prefix: index for index, prefix in enumerate(prefixes)}
    return Batch(
        rows=tuple(rows),
        prefixes=prefixes,
        prefix_index=tuple(index_of[prefix] for prefix in used),
        boundary=rows[0].boundary,
    )
