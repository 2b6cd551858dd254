"""Packing requests onto data shards by prefix: a pure function, the same on every host.

A shard that serves a prefix encodes it once. So a group of rows (those of one prefix) stays together unless it is
larger than a shard's share; then it is split and its prefix is encoded on several shards. This is makespan
scheduling with set-up times: groups are cut into pieces no larger than a bound, pieces go to the least loaded shard in
order of size (longest processing time first, Graham 1969), and rows then move away from the fullest shard while that
helps. The bound that gives the shortest makespan is taken.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence


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
    """A makespan that no packing beats: all work spread evenly, or the dearest row with its prefix."""
    total = sum(group.setup + sum(group.costs) for group in groups if group.costs)
    dearest = max((group.setup + max(group.costs) for group in groups if group.costs), default=0.0)
    return max(total / shards, dearest)


def makespan(groups: Sequence[Group], assignment: Sequence[Sequence[int]], shards: int) -> float:
    """Cost of the fullest shard."""
    return max(_Loads(groups, assignment, shards).of)


def pack(groups: Sequence[Group], shards: int) -> list[list[int]]:
    """Packs groups onto shards.

    Args:
        groups: the work.
        shards: data shards.

    Returns:
        The shard of every row, by group.
    """
    if shards == 1:
        return [[0] * len(group.costs) for group in groups]
    bound = area_bound(groups, shards)
    best: list[list[int]] | None = None
    least = float("inf")
    for slack in (1.0, 1.1, 1.25, 1.5, 0.75, 0.5, 0.34, 0.25):
        assignment = _fill(groups, shards, slack * bound)
        loads = _Loads(groups, assignment, shards)
        _level(loads)
        if max(loads.of) < least * (1 - 1e-12):
            best, least = loads.assignment, max(loads.of)
    assert best is not None
    return best


def _fill(groups: Sequence[Group], shards: int, bound: float) -> list[list[int]]:
    """Cuts groups into pieces of at most `bound` where rows allow, and gives each to the least loaded shard."""
    pieces: list[tuple[float, int, list[int]]] = []
    for number, group in enumerate(groups):
        order = sorted(range(len(group.costs)), key=lambda row: (-group.costs[row], row))
        room = max(bound - group.setup, 1e-30)
        count = min(len(order), shards, max(1, -int(-sum(group.costs) // room)))
        bins: list[tuple[float, int, list[int]]] = [(0.0, place, []) for place in range(count)]
        for row in order:
            cost, place, rows = heapq.heappop(bins)
            rows.append(row)
            heapq.heappush(bins, (cost + group.costs[row], place, rows))
        pieces += [(group.setup + cost, number, rows) for cost, _, rows in sorted(bins, key=lambda bin: bin[1]) if rows]
    assignment = [[0] * len(group.costs) for group in groups]
    loads = [0.0] * shards
    holds: list[set[int]] = [set() for _ in range(shards)]
    for cost, number, rows in sorted(pieces, key=lambda piece: (-piece[0], piece[1], piece[2])):
        setup = groups[number].setup

        def after(shard: int, cost: float = cost, number: int = number, setup: float = setup) -> tuple[float, int]:
            return loads[shard] + cost - (setup if number in holds[shard] else 0.0), shard

        load, shard = min(map(after, range(shards)))
        loads[shard] = load
        holds[shard].add(number)
        for row in rows:
            assignment[number][row] = shard
    return assignment


class _Loads:
    """An assignment with the cost of each shard, changed by moving rows of one group from shard to shard."""

    def __init__(self, groups: Sequence[Group], assignment: Sequence[Sequence[int]], shards: int) -> None:
        self.groups = groups
        self.assignment = [list(places) for places in assignment]
        self.held: list[dict[int, set[int]]] = [{} for _ in range(shards)]
        for number, places in enumerate(assignment):
            for row, shard in enumerate(places):
                self.held[shard].setdefault(number, set()).add(row)
        self.of = [0.0] * shards
        for shard, held in enumerate(self.held):
            for number, rows in held.items():
                self.of[shard] += groups[number].setup + sum(groups[number].costs[row] for row in sorted(rows))

    def items(self, shard: int) -> list[tuple[int, tuple[int, ...]]]:
        """What can leave a shard: whole pieces, and rows of pieces of several."""
        found = []
        for number, rows in sorted(self.held[shard].items()):
            found.append((number, tuple(sorted(rows))))
            if len(rows) > 1:
                costs = self.groups[number].costs
                distinct = {costs[row]: row for row in sorted(rows, reverse=True)}  # equal rows are one choice
                found += [(number, (row,)) for row in sorted(distinct.values())]
        return found

    def without(self, shard: int, number: int, rows: Sequence[int]) -> float:
        """What the shard saves when rows leave it."""
        left = self.groups[number].setup if len(rows) == len(self.held[shard].get(number, ())) else 0.0
        return left + sum(self.groups[number].costs[row] for row in rows)

    def joining(self, shard: int, number: int, rows: Sequence[int]) -> float:
        """What rows cost the shard that they join."""
        new = 0.0 if self.held[shard].get(number) else self.groups[number].setup
        return new + sum(self.groups[number].costs[row] for row in rows)

    def move(self, number: int, rows: Sequence[int], source: int, target: int) -> None:
        """Moves rows."""
        self.of[source] -= self.without(source, number, rows)
        self.of[target] += self.joining(target, number, rows)
        self.held[source][number] -= set(rows)
        if not self.held[source][number]:
            del self.held[source][number]
        self.held[target].setdefault(number, set()).update(rows)
        for row in rows:
            self.assignment[number][row] = target


MOVES = 64
SWAPS = 1024


def _level(loads: _Loads) -> None:
    """Takes rows off the fullest shard while its load, and that of the shard they go to, both end below what it was."""
    for _ in range(MOVES):
        full = max(range(len(loads.of)), key=lambda shard: (loads.of[shard], -shard))
        if not (_move(loads, full) or _swap(loads, full)):
            return


def _move(loads: _Loads, full: int) -> bool:
    """Moves the piece or row that leaves the fuller of both shards lowest."""
    before = loads.of[full]
    targets = sorted((load, shard) for shard, load in enumerate(loads.of) if shard != full)
    best: tuple[float, int, tuple[int, ...], int] | None = None
    for number, rows in loads.items(full):
        left = before - loads.without(full, number, rows)
        # The emptiest shard, and the emptiest of those that hold the prefix already.
        holders = [(load, shard) for load, shard in targets if number in loads.held[shard]]
        for load, shard in dict.fromkeys((targets[0], *holders[:1])):
            after = max(left, load + loads.joining(shard, number, rows))
            if after < before * (1 - 1e-9) and (best is None or after < best[0]):
                best = (after, number, rows, shard)
    if best is None:
        return False
    loads.move(best[1], best[2], full, best[3])
    return True


def _swap(loads: _Loads, full: int) -> bool:
    """Exchanges a piece or row of the fullest shard for a smaller one of another, for what leaves both lowest."""
    before = loads.of[full]
    mine = loads.items(full)
    best: tuple[float, int, tuple[int, ...], int, int, tuple[int, ...]] | None = None
    budget = SWAPS
    for shard in sorted((s for s in range(len(loads.of)) if s != full), key=lambda s: (loads.of[s], s)):
        theirs = loads.items(shard)
        budget -= len(mine) * len(theirs)
        if budget < 0:
            break
        for number, rows in mine:
            for other, others in theirs:
                if number == other:
                    continue
                here = before - loads.without(full, number, rows) + loads.joining(full, other, others)
                there = loads.of[shard] - loads.without(shard, other, others) + loads.joining(shard, number, rows)
                after = max(here, there)
                if after < before * (1 - 1e-9) and (best is None or after < best[0]):
                    best = (after, number, rows, shard, other, others)
    if best is None:
        return False
    _, number, rows, shard, other, others = best
    loads.move(number, rows, full, shard)
    loads.move(other, others, shard, full)
    return True
