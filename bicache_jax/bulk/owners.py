"""Which worker answers which request: whole prefix groups, so that a prefix is encoded in few places."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence


def owners(groups: Sequence[Hashable], costs: Sequence[float], workers: int) -> list[int]:
    """Divides requests over workers, the same on every one of them.

    Groups go to workers whole, the most expensive first, each to the worker with the least so far (longest processing
    time first: at most 4/3 of the shortest possible time; Graham 1969). A group that costs more than a worker's share
    is split into equal runs first, and its prefix is encoded by each worker that has one.

    Args:
        groups: the group of each request: its prefix.
        costs: the work of each request, in any unit.
        workers: how many there are.

    Returns:
        The worker of each request.
    """
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    share = sum(costs) / workers
    pieces: list[tuple[float, list[int]]] = []
    for places in members.values():
        cost = sum(costs[place] for place in places)
        parts = min(len(places), max(1, math.ceil(cost / share))) if share else 1
        bounds = [round(part * len(places) / parts) for part in range(parts + 1)]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            piece = places[begin:end]
            pieces.append((sum(costs[place] for place in piece), piece))
    load = [0.0] * workers
    found = [0] * len(groups)
    for cost, piece in sorted(pieces, key=lambda entry: (-entry[0], entry[1][0])):
        worker = min(range(workers), key=lambda number: (load[number], number))
        load[worker] += cost
        for place in piece:
            found[place] = worker
    return found
