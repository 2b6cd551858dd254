"""The engine: each prefix encoded once, nothing compiled twice, and the same tokens in any company."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import taken_out

from bicache_jax import BicacheError, CacheConfig, Engine, Model, Request, Result, SamplingConfig, load_model
from bicache_jax.serving.compilation import CompileCounter
from bicache_jax.serving.frames import Frames
from bicache_jax.serving.grouping import detect_prefixes
from bicache_jax.serving.openai import to_openai
from bicache_jax.serving.programs import lower_decode

TABLE = {0: 0, 52: 2, 62: 3, 68: 5, 72: 6}


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(golden.FOLDERS["llada"])


def _requests(count: int = 40, **settings: Any) -> list[Request]:
    """Requests over 4 prefixes, of several lengths, with boundaries from 0 to L under `TABLE`."""
    rng = np.random.default_rng(7)
    prefixes = [tuple(map(int, rng.integers(2, 290, size))) for size in (34, 40, 60, 61)]
    sampling = SamplingConfig(gen_length=16, steps=8, **settings)
    requests = []
    for index in range(count):
        prefix = prefixes[index % 4]
        rest = tuple(map(int, rng.integers(2, 290, rng.integers(1, 14))))
        requests.append(Request(f"r{index}", prefix + rest, len(prefix), sampling, index=index))
    return requests


def _tokens(results: list[Result]) -> dict[str, tuple[int, ...]]:
    return {result.id: result.token_ids for result in results}


def _engine(model: Model, batch_size: int | None = None, **cache: Any) -> Engine:
    return Engine(model, cache=CacheConfig(table=TABLE, refresh_interval=3, **cache), batch_size=batch_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"temperature": 0.8}, marks=pytest.mark.full),
        pytest.param({"remasking": "random"}, marks=pytest.mark.full),
        {"block_length": 4, "temperature": 0.5},
    ],
    ids=["greedy", "sampled", "random", "blocks"],
)
def test_a_request_gets_the_same_tokens_in_any_company(model: Model, settings: dict[str, Any]) -> None:
    requests = _requests(**settings)
    together = _engine(model, batch_size=40).generate(requests)
    assert [result.id for result in together] == [request.id for request in requests]
    assert len({result.boundary for result in together}) >= 3
    wanted = _tokens(together)
    shuffled = random.Random(3).sample(requests, len(requests))
    assert _tokens(_engine(model, batch_size=3).generate(shuffled)) == wanted
    alone = _engine(model, batch_size=1)
    for request in requests:
        assert alone.generate([request])[0].token_ids == wanted[request.id]


@pytest.mark.full
def test_block_caches_and_thresholds_keep_that_promise(model: Model) -> None:
    requests = _requests(12, block_length=4, threshold=0.3)
    for block_cache in ("off", "prefix", "dual"):
        wanted = _tokens(_engine(model, block_cache=block_cache).generate(requests))
        alone = _engine(model, batch_size=1, block_cache=block_cache)
        for request in requests[:5]:
            assert alone.generate([request])[0].token_ids == wanted[request.id], block_cache


@pytest.mark.slow
def test_each_prefix_is_encoded_once_in_a_run(model: Model) -> None:
    engine = _engine(model, batch_size=2)
    engine.generate(_requests())
    assert engine.stats.prefixes_encoded == 4
    assert engine.stats.prefix_hits == 36


def test_nothing_is_compiled_for_other_boundaries_intervals_lengths_or_mixes(model: Model) -> None:
    num_layers = model.config.num_layers
    full = {0: 0, 1: 1, 99: num_layers}  # buffers of every run then have room for all boundaries

    def prompt(prefix: int, rng: np.random.Generator) -> tuple[int, ...]:
        return tuple(map(int, rng.integers(2, 290, prefix + int(rng.integers(1, 15)))))

    def run(table: dict[int, int], interval: int, seed: int) -> Engine:
        rng = np.random.default_rng(seed)
        engine = Engine(model, cache=CacheConfig(table=full | table, refresh_interval=interval), batch_size=4)
        deepest = Request("deep", tuple(range(2, 62)), 60, SamplingConfig(gen_length=16, steps=8))
        requests = [deepest, dataclasses.replace(deepest, id="shallow", prefix_len=38)]
        for index in range(3):  # alone in their batches, each with settings of its own
            size = int(rng.integers(33, 63))
            steps = int(rng.integers(4, 16))
            sampling = SamplingConfig(16, steps, temperature=0.1 * (index + 1))
            requests.append(Request(f"{index}", prompt(size, rng), size, sampling))
        shared = [prompt(60, rng)[:60] for _ in range(2)]
        owners = [0, 1, *rng.integers(0, 2, 2)]
        for index in range(4):  # one batch, its two prefixes shared in one way or another
            prefix = shared[owners[index]]
            asked = prefix + prompt(0, rng)
            requests.append(Request(f"m{index}", asked, 60, SamplingConfig(16, 16, temperature=0.5)))
        engine.generate(requests)
        return engine

    # Ratios of these requests lie between 50 and 79; the two fixed ones hold the buffers at their full size.
    base = {50: 0, 79: num_layers}
    for seed in range(3):
        run(base, 4, seed)
    compiled = 0
    for boundary in range(num_layers + 1):
        for interval in (1, 2, 5, 16):
            compiled += run(
                {50: 0, 51: boundary, 79: num_layers}, interval, boundary * 31 + interval
            ).stats.compilations
    assert compiled == 0


def test_samples_share_their_prompt_and_differ_by_seed(model: Model) -> None:
    request = Request("a", tuple(range(2, 60)), None, SamplingConfig(16, 16, temperature=1.0, seed=5), n=3)
    engine = _engine(model)
    samples = engine.generate([request])
    assert [result.sample for result in samples] == [0, 1, 2]
    assert len(_tokens([dataclasses.replace(s, id=str(s.sample)) for s in samples]).values()) == 3
    assert len({sample.token_ids for sample in samples}) == 3
    assert engine.stats.prefixes_encoded == 1
    single = dataclasses.replace(request, n=1, prefix_len=58, sampling=dataclasses.replace(request.sampling, seed=6))
    assert _engine(model).generate([single])[0].token_ids == samples[1].token_ids


@pytest.mark.parametrize("every", [1, 3, 5])
def test_stream_shows_the_canvas_every_few_steps(model: Model, every: int) -> None:
    """Inside refresh intervals of 3 steps as well as at their edges."""
    events = list(_engine(model).stream(_requests(2), every=every))
    unfinished = [event for event in events if event.finish_reason is None]
    assert {event.steps for event in unfinished} == set(range(every, 8, every))
    assert all(event.token_ids.count(model.config.mask_id) == 16 - 2 * event.steps for event in unfinished)
    for event in events:
        assert event.masked == tuple(i for i, token in enumerate(event.token_ids) if token == model.config.mask_id)
        assert event.to_json().get("masked") == (None if event.finish_reason else list(event.masked))
    assert _tokens([event for event in events if event.finish_reason]) == _tokens(_engine(model).generate(_requests(2)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"block_cache": "dual"}, {"block_cache": "prefix"}, {"block_cache": "dual", "threshold": 0.02}],
    ids=["plain", "dual", "prefix", "threshold"],
)
@pytest.mark.slow
def test_how_often_one_looks_changes_nothing_and_compiles_nothing(model: Model, settings: dict[str, Any]) -> None:
    """A dispatch may end anywhere in an interval, and under a block cache anywhere in a block."""
    threshold = settings.pop("threshold", None)
    requests = _requests(8, block_length=4, threshold=threshold)
    engine = _engine(model, **settings)
    wanted = engine.generate(requests)
    compiled = engine.stats.compilations
    for every in (1, 2, 5):
        events = [event for event in engine.stream(requests, every=every) if event.finish_reason]
        assert sorted(map(repr, events)) == sorted(map(repr, wanted))
    assert engine.stats.compilations == compiled


def test_frames_follow_the_clock() -> None:
    now = 0.0
    frames = Frames(seconds=0.1, clock=lambda: now)
    seen = []
    for _ in range(6):
        seen.append(frames.steps)
        now += frames.steps * 0.004
        frames.shown()
    assert seen == [1, 1, 4, 16, 25, 25]
    now += 10.0  # one slow dispatch
    frames.shown()
    assert frames.steps == 1
    assert Frames(7).steps == 7


@pytest.mark.parametrize("where", ["head", pytest.param("layers", marks=pytest.mark.slow)])
def test_logits_that_are_not_finite_end_their_request_alone(model: Model, where: str) -> None:
    """A token's own NaN reaches those that see it: in the embedding one request, in a layer's weight all."""
    requests = _requests(6)
    bad = 295
    spoiled = dataclasses.replace(requests[2], prompt_ids=(*requests[2].prompt_ids[:-1], bad))
    requests[2] = spoiled
    wanted = _tokens(_engine(model).generate(requests))
    params = jax.tree.map(lambda leaf: leaf, model.params)
    if where == "head":
        params["embed"] = params["embed"].at[bad].set(jnp.nan)
    else:
        params["layers"]["down"]["kernel"] = params["layers"]["down"]["kernel"].at[3, 0, 0].set(jnp.inf)
    engine = _engine(dataclasses.replace(model, params=params))
    for results in (engine.generate(requests), [r for r in engine.stream(requests, every=1) if r.finish_reason]):
        failed = {result.id for result in results if result.finish_reason == "error"}
        assert failed == ({"r2"} if where == "head" else {request.id for request in requests})
        for result in results:
            if result.id in failed:
                assert "not finite" in str(result.error) and result.token_ids == () and result.engine_fault
                (line,) = to_openai([result.to_record()], model="m")
                assert line is not None and line["response"]["status_code"] == 500
            else:
                assert result.token_ids == wanted[result.id]


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 5, "temperature": 0.7}, {"threshold": 0.9}])
def test_rules_that_look_at_all_logits_notice_what_is_not_finite(model: Model, settings: dict[str, Any]) -> None:
    params = model.params | {"head": model.params["head"].at[17, 3].set(jnp.nan)}
    results = _engine(dataclasses.replace(model, params=params)).generate(_requests(2, **settings))
    assert {result.finish_reason for result in results} == {"error"}


@pytest.mark.slow
def test_no_cache_is_the_same_program_without_a_prefix(model: Model) -> None:
    requests = _requests(6)
    none = _engine(model, policy="none").generate(requests)
    fresh = Engine(model, cache=CacheConfig(boundary=0, refresh_interval=1)).generate(requests)
    assert _tokens(none) == _tokens(fresh)
    assert {result.prefix_len for result in none} == {0}


def test_merging_boundaries_takes_the_smallest(model: Model) -> None:
    merged = _engine(model, batch_boundary="min", batch_size=40).generate(_requests(8))
    own = _engine(model).generate(_requests(8))
    assert {result.boundary for result in merged} <= {result.boundary for result in own}
    assert all(a.boundary <= b.boundary for a, b in zip(merged, own, strict=True))


def test_raw_requests_and_their_faults_come_back_in_order(model: Model) -> None:
    good = {"prompt_ids": list(range(2, 40)), "gen_length": 8}
    results = _engine(model).generate([good, {"id": "bad", "prompt_ids": [99999]}, good | {"id": "c"}], errors="return")
    assert [(result.id, result.finish_reason == "error") for result in results] == [
        ("1", False),
        ("bad", True),
        ("c", False),
    ]


@pytest.mark.slow
def test_a_block_cache_has_blocks_without_being_told(model: Model) -> None:
    lines = [{"prompt_ids": list(range(2, 40)), "gen_length": length} for length in (8, 64)]
    open_engine = Engine(model, cache=CacheConfig(boundary=2, block_cache="dual"))
    told = [line | {"block_length": min(32, line["gen_length"])} for line in lines]
    assert _tokens(open_engine.generate(lines)) == _tokens(open_engine.generate(told))


def test_a_borrowed_table_is_used_with_a_warning(model: Model) -> None:
    borrowed = dataclasses.replace(model, boundaries={0: 2}, note="using the one published for another")
    with pytest.warns(UserWarning, match="published for another"):
        Engine(borrowed)
    Engine(borrowed, cache=CacheConfig(table={0: 1}))  # no warning: warnings are errors here


def test_a_model_without_a_table_asks_for_one(model: Model) -> None:
    with pytest.raises(BicacheError, match="bicache profile"):
        Engine(model)
    with pytest.raises(BicacheError, match="deeper"):
        Engine(model, cache=CacheConfig(boundary=7))


def test_detected_prefixes_do_not_depend_on_order() -> None:
    requests = _requests(20)
    found = [dataclasses.replace(request, prefix_len=None) for request in requests]
    lengths = detect_prefixes(found, min_prefix=16, min_suffix=0)
    assert lengths == [len(request.prompt_ids[: request.prefix_len]) for request in requests]
    order = random.Random(1).sample(range(20), 20)
    assert detect_prefixes([found[i] for i in order], min_prefix=16, min_suffix=0) == [lengths[i] for i in order]


@pytest.mark.parametrize("cache", [{}, {"block_cache": "dual"}], ids=["bicache", "dual"])
def test_no_pass_is_made_that_no_step_uses(model: Model, cache: dict[str, Any]) -> None:
    engine = _engine(model, **cache)
    plan = engine.plan(_requests(4))
    text = lower_decode(engine._executor.backbone, engine._executor.params, plan, *plan.rounds[0]).compile().as_text()
    for kind in ("refresh", "reuse"):
        assert not taken_out(text, f"/{kind}/while")


def test_time_spent_compiling_holds_traces_and_counts_those_inside_of_others_once() -> None:
    counter = CompileCounter()
    trace = "/jax/core/compile/jaxpr_trace_duration"
    jax.monitoring.record_event_duration_secs(trace, 0.25)
    jax.monitoring.record_event_duration_secs(trace, 0.5)  # began before the other
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1e-7)
    assert counter.count == 1 and counter.seconds == pytest.approx(0.5, abs=1e-6)
