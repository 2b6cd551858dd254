"""The engine that is asked from many tasks and threads: same tokens as alone, places freed, full queues refused."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from typing import Any

import golden
import jax
import numpy as np
import pytest

from bicache_jax import (
    AsyncEngine,
    BicacheError,
    CacheConfig,
    Engine,
    Model,
    Request,
    Result,
    SamplingConfig,
    load_model,
)
from bicache_jax.serving.compilation import CompileCounter
from bicache_jax.serving.grouping import Row
from bicache_jax.serving.shadow import LAST, Shadows


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(golden.FOLDERS["llada"])


def work(count: int, **settings: Any) -> list[Request]:
    """Requests over 3 prefixes, of two lengths, greedy and sampled."""
    rng = np.random.default_rng(3)
    prefixes = [tuple(map(int, rng.integers(6, 290, size))) for size in (34, 40, 61)]
    found = []
    for index in range(count):
        rest = tuple(map(int, rng.integers(6, 290, rng.integers(1, 14))))
        length = 16 if index % 4 else 8
        sampling = SamplingConfig(length, length, 4, temperature=0.7 * (index % 2), seed=index, **settings)
        prefix = prefixes[index % 3]
        found.append(Request(f"r{index}", prefix + rest, len(prefix), sampling, index=index))
    return found


def engine(model: Model, **more: Any) -> Engine:
    return Engine(model, cache=CacheConfig(boundary=2, refresh_interval=3), **{"batch_size": 4, **more})


@pytest.mark.slow
def test_many_tasks_and_threads_get_what_each_would_get_alone(model: Model) -> None:
    requests = work(24)
    alone = engine(model, batch_size=1)
    wanted = {request.id: alone.generate(request)[0] for request in requests}
    found: dict[str, Result] = {}

    async def ask(one: AsyncEngine, request: Request) -> None:
        await asyncio.sleep(random.Random(request.id).random() * 3)
        if request.index % 3:
            found[request.id] = (await one.generate(request, priority=request.index % 2))[0]
            return
        looks = [result async for result in one.stream(request)]
        assert [look.finish_reason is None for look in looks] == [True] * (len(looks) - 1) + [False]
        found[request.id] = looks[-1]

    async def ask_all(one: AsyncEngine, part: list[Request]) -> None:
        await asyncio.gather(*(ask(one, request) for request in part))

    async def main() -> None:
        async with AsyncEngine(engine(model), lanes=2, frame_seconds=0.02) as one:
            parts = [requests[i::3] for i in range(3)]
            threads = [threading.Thread(target=asyncio.run, args=(ask_all(one, part),)) for part in parts[:2]]
            for thread in threads:
                thread.start()
            await ask_all(one, parts[2])
            for thread in threads:
                await asyncio.to_thread(thread.join)
            assert one.pending == 0

    asyncio.run(main())
    assert found == wanted
    assert max(result.cached_tokens for result in found.values()) > 0


def test_cancelled_requests_free_their_places_and_the_queue_has_an_end(model: Model) -> None:
    long = [dataclasses.replace(r, sampling=SamplingConfig(16, 16)) for r in work(6)]

    async def main() -> None:
        async with AsyncEngine(engine(model), max_queue=4, frame_seconds=0.0) as one:
            expected = (await one.generate(long[0]))[0]
            gate = threading.Event()
            one._inbox.put(lambda: None if gate.wait() else None)  # the engine does nothing until it opens
            tasks = [asyncio.create_task(one.generate(request)) for request in long[:4]]
            await asyncio.sleep(0)
            with pytest.raises(BicacheError, match="the queue is full: 4 responses are pending.*max_queue=4"):
                await one.generate(long[4])
            tasks[1].cancel()
            gate.set()
            assert (await tasks[0]) == [expected]
            with pytest.raises(asyncio.CancelledError):
                await tasks[1]
            await one.drain()
            assert one.pending == 0
            with pytest.raises(TimeoutError):
                await one.generate(long[:4], timeout=0.0)
            stream = one.stream(long[2])
            async for _ in stream:
                break
            await stream.aclose()
            await one.drain()
            assert one.pending == 0
            assert [result.id for result in await one.generate(long[:3])] == ["r0", "r1", "r2"]
        with pytest.raises(BicacheError, match="closed"):
            await one.generate(long[0])

    asyncio.run(main())


def test_errors_reach_who_asked_and_nobody_else(model: Model) -> None:
    requests = work(2)

    async def main() -> None:
        async with AsyncEngine(engine(model)) as one:
            with pytest.raises(BicacheError, match="gen_lenght"):
                await one.generate({"prompt_ids": [7, 8], "gen_lenght": 8})
            faulty = await one.generate([{"prompt_ids": [], "id": "a"}, requests[0]], errors="return")
            assert [result.finish_reason for result in faulty] == ["error", "length"]
            with pytest.raises(ValueError, match="max_queue"):
                AsyncEngine(one.engine, max_queue=0)

    asyncio.run(main())


def test_a_fault_of_the_device_is_told_and_others_are_served(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from bicache_jax.serving.lane import Lane

    request, dispatch = work(2)[1], Lane.dispatch

    def fail(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(Lane, "dispatch", dispatch)
        raise RuntimeError("no memory")

    async def main() -> None:
        async with AsyncEngine(engine(model)) as one:
            expected = await one.generate(request)
            monkeypatch.setattr(Lane, "dispatch", fail)
            with pytest.raises(RuntimeError, match="no memory"):
                await one.generate(request)
            assert await one.generate(request) == expected

    asyncio.run(main())


def test_what_is_asked_is_given_up_where_the_engine_is_closed_at_once(model: Model) -> None:
    async def main() -> None:
        one = AsyncEngine(engine(model))
        tasks = [asyncio.create_task(one.generate(request)) for request in work(3)]
        await asyncio.sleep(0)
        await one.close(drain=False)
        for task in tasks:
            with pytest.raises(BicacheError, match="closed"):
                await task

    asyncio.run(main())


@pytest.mark.slow
def test_nothing_is_compiled_once_it_is_warm_and_new_weights_are_used(model: Model) -> None:
    requests = work(12, early_stop=True)

    async def main() -> None:
        async with AsyncEngine(engine(model), frame_seconds=0.0) as one:
            for size in (1, 2, 3, 4, 12, 12):
                await one.generate(requests[:size])
            compiled = CompileCounter()
            first = await one.generate(requests)
            assert compiled.count == 0
            one.engine.update_params(jax.tree.map(lambda leaf: leaf * 1.25, one.engine.model.params))
            await one.generate(requests[0])  # the thread sees the new weights when it has nothing to do
            assert (await one.generate(requests)) != first

    asyncio.run(main())


@pytest.mark.full
def test_shadows_say_what_the_cache_costs(model: Model) -> None:
    requests = work(6)

    async def agreement(**cache: Any) -> Any:
        shadowed = Engine(model, cache=CacheConfig(**cache), batch_size=4)
        async with AsyncEngine(shadowed, shadow=1.0) as one:
            answers = await one.generate(requests)
            for _ in range(200):  # shadows run when nobody else is there
                if sum(found.responses for found in one.shadows.values()) == len(requests):
                    break
                await asyncio.sleep(0.1)
            return answers, one.shadows

    _, exact = asyncio.run(agreement(boundary=0, refresh_interval=1))
    assert all(found.same == found.responses and found.tokens == 1.0 for found in exact.values())
    assert all(found.drift <= found.most_drift < 1e-5 for found in exact.values()), "b = 0 computes everything"
    answers, found = asyncio.run(agreement(policy="naive"))
    plain = Engine(model, cache=CacheConfig(policy="none")).generate(requests)
    same = sum(one.token_ids == other.token_ids for one, other in zip(answers, plain, strict=True))
    assert sum(place.same for place in found.values()) == same < len(requests)
    assert {place.boundary for place in found} == {6}
    assert all(0 < place.drift < place.most_drift for place in found.values())


def test_a_share_of_the_requests_has_shadows() -> None:
    rows = [Row(request, 0, 20, 60, 2) for request in work(400)]
    result = Result("r", token_ids=(1,) * 8)
    chosen = [shadow for row in rows if (shadow := Shadows(0.25).of(row, result)) is not None]
    assert 70 < len(chosen) < 130
    assert {(row.prefix_len, row.boundary, row.priority) for row in chosen} == {(0, 0, LAST)}
    with pytest.raises(ValueError, match="shadow"):
        Shadows(1.5)


def test_a_dispatch_takes_as_long_as_a_frame(model: Model) -> None:
    async def main() -> None:
        one_row = engine(model)
        async with AsyncEngine(one_row, frame_seconds=60.0) as one:
            await one.generate({"prompt_ids": list(range(20, 40)), "gen_length": 64})
            assert one_row.stats.dispatches <= 8  # their length grows four times over each time

    asyncio.run(main())
