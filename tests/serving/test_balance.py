"""Balance over data shards: every row once, the same each time, near the best there is."""

from __future__ import annotations

import itertools
import random

import hypothesis
import hypothesis.strategies as st
import pytest

from bicache_jax.core.config import CacheConfig, ModelConfig, SamplingConfig
from bicache_jax.core.types import Request
from bicache_jax.serving.balance import Group, area_bound, makespan, pack
from bicache_jax.serving.grouping import Row
from bicache_jax.serving.rounds import IDLE, plan_rounds

CONFIG = ModelConfig("llada", 32, 8, 4, 2, 2, 4, 16, 1e4, 1e-5, 512, 5)

groups = st.lists(
    st.tuples(st.integers(0, 20), st.lists(st.integers(1, 12), max_size=4)),
    max_size=5,
).filter(lambda found: sum(len(costs) for _, costs in found) <= 7)


def best(work: list[Group], shards: int) -> float:
    """The least makespan, by trying all."""
    rows = [number for number, group in enumerate(work) for _ in group.costs]
    costs = [cost for group in work for cost in group.costs]
    least = float("inf")
    for places in itertools.product(range(shards), repeat=len(rows)):
        if any(place > max(places[:i], default=-1) + 1 for i, place in enumerate(places)):
            continue  # shards are alike: the first to be named is shard 0
        loads = [0.0] * shards
        for number, shard in {(number, shard) for number, shard in zip(rows, places, strict=True)}:
            loads[shard] += work[number].setup
        for cost, shard in zip(costs, places, strict=True):
            loads[shard] += cost
        least = min(least, max(loads))
    return least


@hypothesis.settings(max_examples=60)
@hypothesis.given(groups, st.integers(2, 3))
def test_makespan_is_near_the_least(drawn: list[tuple[int, list[int]]], shards: int) -> None:
    """No more than half above it: the worst of 89,000 random mixes was at 4/3."""
    work = [Group(float(setup), tuple(map(float, costs))) for setup, costs in drawn]
    found = pack(work, shards)
    assert [len(places) for places in found] == [len(group.costs) for group in work]
    assert all(0 <= shard < shards for places in found for shard in places)
    assert found == pack(work, shards)
    assert area_bound(work, shards) <= makespan(work, found, shards) + 1e-9
    assert makespan(work, found, shards) <= 3 / 2 * best(work, shards) + 1e-9


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(2, 3))
def test_rows_that_share_nothing_keep_the_guarantee_of_longest_first(costs: list[int], shards: int) -> None:
    """Graham 1969: 4/3 - 1/(3 m) of the least."""
    work = [Group(0.0, (float(cost),)) for cost in costs]
    guarantee = 4 / 3 - 1 / (3 * shards)
    assert makespan(work, pack(work, shards), shards) <= guarantee * best(work, shards) + 1e-9


def test_few_large_groups_are_cut_finely_enough() -> None:
    """Whole groups would leave all shards but one half empty."""
    work = [Group(10.0, (1.0,) * 64) for _ in range(9)]
    assert makespan(work, pack(work, 8), 8) <= 1.12 * area_bound(work, 8)


@pytest.mark.parametrize(("shards", "prefixes", "limit"), [(8, 200, 1.02), (8, 1000, 1.005), (64, 1000, 1.02)])
def test_large_mixes_come_close_to_the_area_bound(shards: int, prefixes: int, limit: float) -> None:
    rng = random.Random(prefixes)
    work = [
        Group(rng.uniform(0.1, 3), tuple(rng.uniform(0.5, 2) for _ in range(min(200, int(rng.paretovariate(1.0))))))
        for _ in range(prefixes)
    ]
    assert makespan(work, pack(work, shards), shards) <= limit * area_bound(work, shards)


def test_a_large_group_is_split_and_small_ones_stay_whole() -> None:
    work = [Group(1.0, (1.0,) * 60), *[Group(1.0, (1.0,) * 3)] * 5]
    found = pack(work, 4)
    assert len(set(found[0])) >= 3
    assert all(len(set(places)) == 1 for places in found[1:])
    assert makespan(work, found, 4) == 21.0


def _rows(count: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    prefixes = [tuple(rng.choices(range(6, 30), k=rng.choice((20, 33, 70)))) for _ in range(5)]
    rows = []
    for index in range(count):
        prefix = rng.choice([(), *prefixes])
        steps = rng.choice((4, 8))
        rest = tuple(rng.choices(range(6, 30), k=rng.randint(1, 40)))
        request = Request(f"{index}", prefix + rest, len(prefix), SamplingConfig(8, steps), index=index)
        rows.append(Row(request, 0, len(prefix), 50, rng.randint(0, 4) if prefix else 0))
    return rows


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.integers(0, 60), st.integers(1, 5), st.integers(0, 99))
def test_rounds_run_every_row_once_and_do_not_depend_on_order(count: int, shards: int, seed: int) -> None:
    rows = _rows(count, seed)
    cache = CacheConfig(boundary=2)
    rounds = plan_rounds(CONFIG, cache, rows, shards=shards, batch_size=4)
    ran = [row.request.id for batches in rounds for batch in batches for row in batch.rows]
    assert sorted(ran) == sorted(row.request.id for row in rows)
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert plan_rounds(CONFIG, cache, shuffled, shards=shards, batch_size=4) == rounds
    for batches in rounds:
        assert len(batches) == shards and any(batch.rows for batch in batches)
        assert all(batch is IDLE or batch.rows for batch in batches)
        steps = {row.request.sampling.num_steps for batch in batches for row in batch.rows}
        assert len(steps) <= 2
