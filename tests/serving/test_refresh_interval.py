"""The refresh interval where none is given: one function says it, and whoever runs, plans or reports asks that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import CacheConfig, Engine, Model, Request, SamplingConfig, denoise, encode_prefix, load_model
from bicache_jax.cli import benchmark, build_parser, main
from bicache_jax.core.config import BLOCK_CACHES
from bicache_jax.serving.flops import Job, row_flops

BLOCKS = {"gen_length": 32, "block_length": 8}


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(golden.FOLDERS["llada"])


@pytest.mark.parametrize(
    ("block_cache", "settings", "interval"),
    [
        ("off", {}, 16),
        ("off", BLOCKS, 16),
        ("off", {**BLOCKS, "threshold": 0.9}, 16),
        ("dual", BLOCKS, 8),
        ("prefix", {**BLOCKS, "steps": 16}, 4),
        ("dual", {**BLOCKS, "steps": 4}, 1),
        ("dual", {**BLOCKS, "steps": 128}, 32),
        ("dual", {**BLOCKS, "steps": 4, "threshold": 0.9}, 8),  # where steps mean nothing
        ("dual", {**BLOCKS, "factor": 1.0}, 8),
        ("dual", {"gen_length": 128}, 128),
    ],
)
def test_auto_is_sixteen_or_the_steps_of_a_block(block_cache: Any, settings: dict[str, Any], interval: int) -> None:
    sampling = SamplingConfig(**settings)
    assert CacheConfig(block_cache=block_cache).interval(sampling) == interval
    for given in (1, 16, 100):
        assert CacheConfig(block_cache=block_cache, refresh_interval=given).interval(sampling) == given


def test_intervals_that_are_none() -> None:
    with pytest.raises(ValueError, match="must be 'auto' or an integer >= 1, got 0"):
        CacheConfig(refresh_interval=0)
    assert hash(CacheConfig()) == hash(CacheConfig(refresh_interval="auto"))


def _requests(**settings: Any) -> list[Request]:
    rng = np.random.default_rng(3)
    prefix = tuple(map(int, rng.integers(2, 290, 40)))
    rest = [tuple(map(int, rng.integers(2, 290, 6))) for _ in range(4)]
    return [Request(f"r{i}", prefix + tail, 40, SamplingConfig(**settings)) for i, tail in enumerate(rest)]


@pytest.mark.parametrize(
    ("settings", "interval"), [({"steps": 16}, 4), ({"threshold": 0.9, "steps": 4}, 8)], ids=["steps", "threshold"]
)
@pytest.mark.slow
def test_the_engine_refreshes_where_a_block_starts(model: Model, settings: dict[str, Any], interval: int) -> None:
    requests = _requests(**BLOCKS, **settings)

    def results(given: Any) -> list[Any]:
        cache = CacheConfig(boundary=2, block_cache="dual", refresh_interval=given)
        return Engine(model, cache=cache).generate(requests)

    found, tokens = results("auto"), [result.token_ids for result in results(interval)]
    assert [result.token_ids for result in found] == tokens
    assert {result.refresh_interval for result in found} == {interval}
    assert tokens != [result.token_ids for result in results(1)]


def test_each_request_has_its_own(model: Model) -> None:
    settings = [{"steps": 32}, {"steps": 16}, {"steps": 8, "threshold": 0.5}]
    requests = [
        Request(f"{i}", tuple(range(10, 60)), 40, SamplingConfig(**BLOCKS, **more), index=i)
        for i, more in enumerate(settings)
    ]
    plan = Engine(model, cache=CacheConfig(boundary=2, block_cache="dual")).plan(requests)
    assert "refresh interval N = 4, 8\n" in plan.describe()
    steps_and_n = {(b.rows[0].request.id, plan.cache.interval(b.rows[0].request.sampling)) for b in plan.batches}
    assert steps_and_n == {("0", 8), ("1", 4), ("2", 8)}  # rows of a batch share N


def test_plans_count_the_passes_that_are_made(model: Model) -> None:
    requests = _requests(**BLOCKS, steps=16)
    for block_cache in BLOCK_CACHES:
        auto = CacheConfig(boundary=2, block_cache=block_cache)
        given = CacheConfig(boundary=2, block_cache=block_cache, refresh_interval=auto.interval(requests[0].sampling))
        assert Engine(model, cache=auto).plan(requests).gain == Engine(model, cache=given).plan(requests).gain
    # A refresh inside a block costs a pass over the prefix: with blocks of 32 steps there are half as many.
    common = {"prefix": 768, "suffix": 256, "steps": 64, "block": 32, "response": 64, "boundary": 4}
    inside, auto_ = (Job(**common, block_cache="dual", refresh_interval=n) for n in (16, 32))
    refreshes = [sum(n for kind, n in job.passes().items() if kind.refresh) for job in (inside, auto_)]
    assert refreshes == [4, 2] and row_flops(model.config, auto_) < row_flops(model.config, inside)


@pytest.mark.slow
def test_the_functional_layer_has_the_same_default(model: Model) -> None:
    ids = np.random.default_rng(5).integers(2, 290, 50)
    prefix = encode_prefix(model.params, model.config, jnp.asarray(ids[:40]), boundaries=[2])
    canvas = jnp.asarray(np.concatenate([ids[40:], np.zeros(32, int)])[None])

    def tokens(block_cache: str, **given: Any) -> list[int]:
        sampling = SamplingConfig(**BLOCKS, steps=16)
        arguments = (model.params, model.config, prefix, canvas, 2, sampling, jax.random.key(0))
        return denoise(*arguments, block_cache=block_cache, **given).tokens[0].tolist()

    assert tokens("dual") == tokens("dual", refresh_interval=4)


def test_commands_take_auto_and_say_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text(json.dumps({"prompt_ids": list(range(10, 50)), "prefix_len": 30}) + "\n")
    flags = ["--model", str(golden.FOLDERS["llada"]), "--boundary", "2", "--gen-length", "16", "--block-length", "8"]
    shown = ["generate", *flags, "--input", str(requests), "--dry-run"]
    for more, interval in (([], 16), (["--block-cache", "dual"], 8), (["--block-cache", "dual", "--steps", "4"], 2)):
        assert main([*shown, *more]) == 0
        assert f"refresh interval N = {interval}\n" in capsys.readouterr().out
    assert main([*shown, "--refresh-interval", "0"]) == 2
    assert "--refresh-interval: must be 'auto' or an integer >= 1, got '0'" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_says_the_interval_of_each_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text(json.dumps({"prompt_ids": list(range(10, 50)), "prefix_len": 30, "answer": "x"}) + "\n")
    flags = ["--model", str(golden.FOLDERS["llada"]), "--boundary", "2", "--gen-length", "16", "--block-length", "8"]
    evaluated = ["evaluate", *flags, "--task", str(requests), "--policies", "bicache,bicache+dual", "--timed", "0"]
    assert main([*evaluated, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["refresh_intervals"] for result in results] == [[16], [8]]


def test_the_benchmark_keeps_its_default_and_takes_auto() -> None:
    def intervals(*flags: str) -> list[tuple[str, int]]:
        policies = ["--policies", "bicache,bicache+dual"]
        args = build_parser().parse_args(["benchmark", "--random", "small", *policies, *flags])
        return [(case.policy, case.refresh_interval) for case in benchmark._cases(args)]

    assert intervals() == [("bicache", 16), ("bicache+dual", 16)]
    # 128 tokens in blocks of 32 and 16 steps: 4 steps a block
    assert intervals("--refresh-interval", "auto") == [("bicache", 16), ("bicache+dual", 4)]
    assert intervals("--refresh-interval", "auto,16") == [("bicache", 16), ("bicache+dual", 4), ("bicache+dual", 16)]
