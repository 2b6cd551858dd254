"""Lanes: rows leave when they are done, others take their places, and no token changes by it."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import golden
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bicache_jax import CacheConfig, Engine, Model, Request, SamplingConfig, load_model
from bicache_jax.serving.compilation import CompileCounter
from bicache_jax.serving.grouping import Row
from bicache_jax.serving.lane import _Shard
from bicache_jax.serving.scheduler import most_prefixes, result_of

CACHES: dict[str, dict[str, Any]] = {
    "bicache": {"boundary": 2, "refresh_interval": 3},
    "none": {"policy": "none"},
    "dual": {"boundary": 2, "block_cache": "dual"},
    "prefix": {"boundary": 2, "refresh_interval": 3, "block_cache": "prefix"},
}


def ending(family: str) -> Model:
    """A golden model for which many tokens end a text, so that rows stop early, each in its own block."""
    model, ends = load_model(golden.FOLDERS[family]), range(3, 290, {"llada": 2, "dream": 7}[family])
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=tuple(ends)))


def pool(**sampling: Any) -> list[Request]:
    """Requests over 5 prefixes in one bucket, greedy and sampled."""
    rng = np.random.default_rng(5)
    prefixes = [tuple(map(int, rng.integers(6, 290, size))) for size in (34, 40, 44, 50, 61)]
    found = []
    for index in range(15):
        prefix = prefixes[index % 5]
        rest = tuple(map(int, rng.integers(6, 290, rng.integers(1, 14))))
        own = SamplingConfig(16, 16, 4, early_stop=True, temperature=0.6 * (index % 2), seed=index)
        own = dataclasses.replace(own, **sampling)
        found.append(Request(f"r{index}", prefix + rest, len(prefix), own, index=index))
    return found


def of_lengths(*lengths: int) -> list[Request]:
    """Requests whose responses have so many tokens."""
    requests = pool(temperature=0.5, early_stop=False)
    return [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, gen_length=length, steps=length))
        for request, length in zip(requests, lengths, strict=False)
    ]


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    return ending(request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "policy", "threshold"),
    [
        ("dream", "bicache", 0.2),
        pytest.param("llada", "none", 0.2, marks=pytest.mark.full),
        pytest.param("llada", "bicache", None, marks=pytest.mark.full),
        pytest.param("dream", "dual", None, marks=pytest.mark.full),
        pytest.param("llada", "dual", 0.2, marks=pytest.mark.full),
        pytest.param("llada", "prefix", 0.2, marks=pytest.mark.full),
        pytest.param("dream", "prefix", None, marks=pytest.mark.full),
    ],
)
def test_who_joins_and_who_leaves_changes_no_token(family: str, policy: str, threshold: float | None) -> None:
    model = ending(family)
    requests = pool(threshold=threshold)
    longer = dataclasses.replace(requests[0].sampling, gen_length=40, steps=40)  # in a bucket of its own
    requests[::5] = [dataclasses.replace(request, sampling=longer) for request in requests[::5]]
    cache = CacheConfig(**CACHES[policy])
    alone = Engine(model, cache=cache, batch_size=1)
    wanted = {request.id: alone.generate([request])[0] for request in requests}
    assert len({result.forward_passes for result in wanted.values()}) > 1
    lanes = Engine(model, cache=cache, batch_size=3)

    @settings(max_examples=8, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(requests), min_size=1, unique_by=id), st.sampled_from([None, 1, 3]))
    def check(chosen: list[Request], every: int | None) -> None:
        found = lanes.generate(chosen) if every is None else lanes.stream(chosen, every=every)
        finished = [result for result in found if result.finish_reason]
        assert sorted(result.id for result in finished) == sorted(request.id for request in chosen)
        assert all(result == wanted[result.id] for result in finished)

    check()
    stats = lanes.stats
    assert 0 < stats.forward_passes <= stats.row_steps


def test_rows_take_free_places_and_nothing_is_compiled_for_them(model: Model) -> None:
    engine = Engine(model, cache=CacheConfig(**CACHES["bicache"]), batch_size=4)
    requests = pool(temperature=0.5)
    for size in (15, 2, 1):
        engine.generate(requests[:size])
    before, compiled = engine.stats, CompileCounter()
    results = engine.generate([dataclasses.replace(r, id=r.id + "+") for r in requests])
    after = engine.stats
    assert compiled.count == 0
    assert after.batches - before.batches < len(results) / 4  # fewer than batches that wait for their slowest row
    assert after.dispatches - before.dispatches > after.batches - before.batches


def test_shorter_rows_take_the_places_that_the_last_long_ones_leave_idle() -> None:
    model = ending("dream")
    requests = of_lengths(36, 44, 48, 8, 8, 8)
    cache = CacheConfig(**CACHES["bicache"])

    def run(*parts: list[Request]) -> tuple[list[Any], int]:
        engine = Engine(model, cache=cache, batch_size=3)
        return [result for part in parts for result in engine.generate(part)], engine.stats.row_steps

    apart, steps_apart = run(requests[:3], requests[3:])
    together, steps = run(requests)
    assert together == apart
    assert steps_apart == 3 * (48 + 8) and steps < steps_apart


def test_a_batch_that_has_guests_grows_for_rows_of_its_own() -> None:
    requests = of_lengths(36, 48, 48, 16, 16, 44, 48, 48)
    engine = Engine(ending("dream"), cache=CacheConfig(**CACHES["bicache"]), batch_size=6)
    wanted = {result.id: result for result in engine.generate(requests)}
    _, rows = engine.admitted(requests, None, "raise")
    scheduler, prefixes = engine.open_scheduler(lanes=1, patience=math.inf)
    late = rows[5:]
    for row in rows[:5]:
        scheduler.submit(row)
    sizes = []

    def between() -> bool:
        lane = next((one.lane for one in scheduler._classes.values() if one.lane is not None), None)
        if lane is not None:
            sizes.append((lane.shape[2:], sum(row in rows[3:5] for row in lane.under_way()[0])))
            if sizes[-1][1]:
                while late:
                    scheduler.submit(late.pop())
        return True

    found = [result_of(engine.executor, seen) for seen in scheduler.run(between=between)]
    prefixes.close()
    assert {result.id: result for result in found if result is not None} == wanted
    assert ((3, 64), 1) in sizes and ((4, 64), 0) in sizes  # a guest in a lane of long rows, which then grows


def test_rows_of_one_bucket_share_a_lane_whatever_their_lengths() -> None:
    model = ending("llada")
    requests = of_lengths(8, 12, 16)
    cache = CacheConfig(**CACHES["bicache"])
    engine = Engine(model, cache=cache, batch_size=3)
    assert engine.generate(requests) == [Engine(model, cache=cache).generate([request])[0] for request in requests]
    assert engine.stats.batches == 1


def test_a_batch_may_have_fewer_rows_than_its_shape_has_places(model: Model) -> None:
    requests = pool(temperature=0.5)
    wanted = Engine(model, cache=CacheConfig(**CACHES["bicache"]), batch_size=1).generate(requests)
    engine = Engine(model, cache=CacheConfig(**CACHES["bicache"]), batch_size=5)  # in a bucket of 6
    assert engine.generate(requests) == wanted


def test_rows_that_decide_by_confidence_do_not_wait_for_a_refresh_that_costs_nothing(model: Model) -> None:
    engine = Engine(model, cache=CacheConfig(policy="none", refresh_interval=3), batch_size=15)
    together = [r for r in pool(threshold=0.2, early_stop=False, temperature=0.7) if len(r.prompt_ids) <= 48]
    found = engine.generate(together)
    assert engine.stats.batches == 1
    assert engine.stats.row_steps == len(found) * max(result.forward_passes for result in found)
    assert len({result.forward_passes for result in found}) > 1


def row(prefix: int, *, guided: bool = False) -> Row:
    sampling = SamplingConfig(16, 8, cfg_scale=1.0 * guided)
    return Row(Request(f"r{prefix}", (prefix,) * 4, 3, sampling), 0, 3, 15, 2)


def test_prefixes_keep_their_places_while_rows_use_them() -> None:
    shard = _Shard(2, 2, deque())
    a, b, c = (("", (n,)) for n in range(3))
    assert shard.hold([a]) == [(0, True)]
    shard.rows[0], shard.index[0] = row(1), (0,)
    assert shard.hold([a]) == [(0, False)]
    assert shard.hold([b]) == [(1, True)]
    shard.rows[1], shard.index[1] = row(2), (1,)
    assert shard.hold([c]) is None and shard.prefixes == [a, b]
    shard.rows[0] = None
    assert shard.hold([c, a]) is None  # neither of the two may push the other out
    assert shard.hold([b, c]) == [(1, False), (0, True)]
    assert shard.prefixes == [c, b]


def test_places_for_prefixes_are_counted_over_neighbours() -> None:
    rows = [row(n) for n in (1, 1, 2, 2, 2, 3, 4, 4)]
    assert most_prefixes(rows, 3, 0) == 3
    assert most_prefixes(rows, 2, 0) == 2
    assert most_prefixes(rows[:2], 8, 0) == 1
    assert most_prefixes([row(n, guided=True) for n in (1, 1, 2)], 2, 0) == 3
