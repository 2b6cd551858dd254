"""What `bicache benchmark` counts and prints. Speed itself is never tested: the machine decides that."""

from __future__ import annotations

import dataclasses
import json
import math

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import BicacheError
from bicache_jax.cli import benchmark as command
from bicache_jax.cli import build_parser, main
from bicache_jax.configs import model_shape
from bicache_jax.core.backbone import layer_params
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.numerics import precision
from bicache_jax.loading import random_model
from bicache_jax.measure.benchmark import Case, EngineRunner, measure, synthetic_requests
from bicache_jax.models import abstract
from bicache_jax.serving.flops import Job, batch_seconds, gain_limit, head_flops, layer_flops, row_flops, weight_bytes
from bicache_jax.wiring import backbone_for

SMALL = model_shape("small")


def test_counted_operations_of_a_layer_and_the_head_are_those_of_the_compiler() -> None:
    backbone, params = backbone_for(SMALL), abstract(SMALL)
    num_prefix, num_suffix = 128, 128  # one tile: of a loop the compiler counts one turn
    kv = jax.ShapeDtypeStruct((1, SMALL.num_kv_heads, num_prefix, SMALL.head_dim), jnp.float32)
    x = jax.ShapeDtypeStruct((1, num_suffix, SMALL.d_model), jnp.float32)

    def layer(params, x, k_prefix, v_prefix):
        weights, positions = layer_params(params, 0), jnp.arange(num_suffix)[None]
        k, v = backbone.key_value(weights, x, positions)
        q = backbone.query(weights, x, positions)
        length, valid = jnp.full((1,), num_prefix), jnp.ones((1, num_suffix), bool)
        attended = backbone.attention(q, k_prefix, v_prefix, k, v, prefix_len=length, suffix_valid=valid)
        return backbone.finish(weights, x, attended)

    counted = jax.jit(layer).lower(params, x, kv, kv).cost_analysis()["flops"]
    assert layer_flops(SMALL, num_suffix, num_prefix + num_suffix) == pytest.approx(counted, rel=0.02)

    def head(params, x):
        return jnp.einsum("btd,vd->btv", x, backbone.head(params)[0], precision=precision(x.dtype))

    counted = jax.jit(head).lower(params, x).cost_analysis()["flops"]
    assert head_flops(SMALL, num_suffix) == pytest.approx(counted, rel=0.02)


def test_work_of_a_run_by_hand() -> None:
    layers, whole = SMALL.num_layers, layer_flops(SMALL, 40, 40)
    none = Job(prefix=0, suffix=40, steps=6, block=8)
    assert row_flops(SMALL, none) == 6 * (layers * whole + head_flops(SMALL, 8))

    # Two refreshes of the five deep layers, and the prefix encoded once for four rows.
    job = Job(prefix=24, suffix=16, steps=6, block=8, boundary=3, refresh_interval=4, rows_per_prefix=4)
    suffix = layers * layer_flops(SMALL, 16, 40)
    encode = layers * layer_flops(SMALL, 24, 24)  # the published code encodes through all layers
    by_hand = 6 * (suffix + head_flops(SMALL, 8)) + 2 * 5 * layer_flops(SMALL, 24, 40)
    counted = row_flops(SMALL, job, published=True)
    assert by_hand < counted <= by_hand + encode / 4
    assert row_flops(SMALL, job) < counted
    assert row_flops(SMALL, dataclasses.replace(job, boundary=layers - 1)) == row_flops(
        SMALL, dataclasses.replace(job, boundary=layers)
    )


@pytest.mark.parametrize(
    ("block_cache", "windows"),
    [("off", {16: 4}), ("dual", {16: 2, 4: 2}), ("prefix", {16: 2, 8: 1, 4: 1})],
)
def test_windows_of_block_caches(block_cache, windows) -> None:
    job = Job(prefix=8, suffix=16, steps=4, block=4, response=8, refresh_interval=4, block_cache=block_cache)
    found = job.passes()
    spans = {kind.span for kind in found}
    assert {span: sum(n for kind, n in found.items() if kind.span == span) for span in spans} == windows
    assert sum(n for kind, n in found.items() if kind.refresh) == 1


def test_passes_that_keep_finished_blocks() -> None:
    """The rest of the prompt with the first block, then each block with the one before it, or alone."""
    job = Job(prefix=8, suffix=18, steps=8, block=4, response=16, exact=True)
    assert job.passes() == {(False, 6, 14): 1, (False, 4, 14): 1} | {
        (False, span, 8 + 2 + 4 * (block + 1)): 1 for block in (1, 2, 3) for span in (8, 4)
    }
    plain = job.without_prefix()
    assert set(plain.passes()) == {(False, 26, 26)} and row_flops(SMALL, plain) > 3 * row_flops(SMALL, job)


def test_limits() -> None:
    job = Job(prefix=768, suffix=256, steps=32, block=128, boundary=4, refresh_interval=16, rows_per_prefix=4)
    flops = row_flops(SMALL, job.without_prefix(), published=True) / row_flops(SMALL, job, published=True)
    assert gain_limit(SMALL, job, 4) == pytest.approx(flops)
    assert gain_limit(SMALL, job.without_prefix()) == 1
    assert gain_limit(SMALL, dataclasses.replace(job, boundary=8)) > flops
    # Where memory is all that counts, steps cost the same with and without a cache.
    assert gain_limit(SMALL, job, 4, peak=math.inf, bandwidth=1.0) == pytest.approx(1)
    assert batch_seconds(SMALL, job, 1, peak=math.inf, bandwidth=1.0) > 32 * weight_bytes(SMALL, 4)


def test_requests_have_the_lengths_asked_for() -> None:
    case = Case("none", 24, 16, 6, 2, 4, "auto", SamplingConfig(gen_length=8))
    requests = synthetic_requests(SMALL, case)
    assert {len(request.prompt_ids) for request in requests} == {24 + 8}
    assert len({request.prompt_ids[:24] for request in requests}) == 2
    assert SMALL.mask_id not in np.concatenate([request.prompt_ids for request in requests])
    with pytest.raises(BicacheError, match="is too short for gen_length"):
        synthetic_requests(SMALL, dataclasses.replace(case, suffix=7))


@pytest.mark.slow
def test_the_command_prints_every_column(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    picture = tmp_path / "speed.png"
    status = main(
        ["benchmark", "--model", str(golden.FOLDERS["llada"]), "--policies", "none,bicache,bicache+dual"]
        + ["--boundary", "2", "--prefix", "24", "--suffix", "16", "--rows", "2", "--refresh-interval", "2"]
        + ["--gen-length", "8", "--steps", "4", "--block-length", "4", "--repeats", "2", "--seconds", "1", "--json"]
        + ["--plot", str(picture)]
    )
    assert status == 0
    record = json.loads(capsys.readouterr().out)
    assert record["device"] and record["matmul_peak_gflops"] > 0
    assert [r["policy"] for r in record["results"]] == ["none", "bicache", "bicache+dual"]
    for result in record["results"]:
        assert result["tokens_per_s"] > 0 and result["first_token_s"] > 0 and result["mfu"] > 0
        assert result["ratio_to_none"] > 0 and result["limit"] >= 1 and result["limit_share"] > 0
        assert result["memory_bytes"] > 0 and result["dispatches"] >= 1 and result["forward_passes"] == 2 * 4
    cached = {result["policy"]: result["cache_bytes"] for result in record["results"]}
    assert cached["none"] == 0 < cached["bicache"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--random", "huge"], "no model shape 'huge'"),
        (["--random", "small", "--policies", "fast"], "policy 'fast'"),
        (["--random", "small", "--rows", "1", "--prefixes", "2"], "--prefixes 2"),
        (["--random", "small", "--suffix", "8", "--gen-length", "16"], "is too short for gen_length"),
        (["--random", "small", "--restart"], "--restart needs --model"),
        (["--random", "small", "--policies", "none+dual", "--gen-length", "50"], "--gen-length"),
        (["--random", "small", "--baseline", "caffe"], "the baselines are torch, torch+compile"),
    ],
)
def test_faults_are_one_line(flags, fault, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *flags]) == 2
    complaint = capsys.readouterr().err
    assert fault in complaint and complaint.count("\n") == 1


def test_the_torch_baseline_gives_the_same_tokens() -> None:
    pytest.importorskip("torch")
    from bicache_jax.measure.torch_baseline import TorchRunner
    from bicache_jax.serving.engine import Engine

    model = random_model("small", dtype="float32")
    case = Case("none", 40, 24, 2, 1, 16, "auto", SamplingConfig(gen_length=16, steps=8))
    requests = synthetic_requests(model.config, case)
    ours = Engine(model, cache=CacheConfig(policy="none")).generate(requests)
    assert TorchRunner(model, case).generate(8).tolist() == [list(result.token_ids) for result in ours]


def test_a_run_reports_the_work_of_its_own_policy() -> None:
    model = random_model("small", dtype="float32")
    case = Case("naive", 24, 16, 2, 1, 4, "auto", SamplingConfig(gen_length=8, steps=2))
    runner = EngineRunner(model, case)
    assert runner.job().boundary == SMALL.num_layers and runner.job().rows_per_prefix == 2
    assert EngineRunner(model, dataclasses.replace(case, policy="none")).job().suffix == 40
    uneven = EngineRunner(model, dataclasses.replace(case, rows=5, prefixes=2))
    assert uneven.job().rows_per_prefix == 2.5


class _Clockwork:
    """A runner that takes its time, by the clock of the test."""

    def __init__(self, clock: list[float], seconds: list[float]) -> None:
        self.clock, self.seconds, self.prepared = clock, iter(seconds), 0

    def prepare(self) -> None:
        self.prepared += 1

    def run(self) -> float:
        seconds = next(self.seconds)
        self.clock[0] += seconds
        return seconds

    def first_token(self) -> float:
        self.clock[0] += 1
        return 1.0

    def facts(self) -> dict[str, object]:
        return {}


def test_turns_go_round_the_cases_and_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, peaks = [0.0], iter([3.0] * 7 + [5.0] + [4.0] * 20)
    monkeypatch.setattr("bicache_jax.measure.benchmark.time.perf_counter", lambda: clock[0])
    runners = [_Clockwork(clock, [9.0, 11.0, 10.0, 1.0]), _Clockwork(clock, [5.0, 3.0, 4.0, 1.0])]
    times, firsts, peak = measure(runners, peak=lambda: next(peaks), repeats=5, seconds=50)
    assert times.tolist() == [[9, 5], [11, 3], [10, 4]]  # a fourth turn of 16 seconds would end at 64
    assert firsts.shape == times.shape and peak == 5 and [runner.prepared for runner in runners] == [1, 1]
    slow = [_Clockwork(clock, [99.0])]
    assert len(measure(slow, peak=lambda: 1.0, repeats=5, seconds=50)[0]) == 1


def test_lengths_that_flags_leave_open_go_together() -> None:
    def sampling(*flags: str) -> list[SamplingConfig]:
        args = build_parser().parse_args(["benchmark", "--random", "small", *flags])
        return [case.sampling for case in command._cases(args)]

    assert set(sampling("--refresh-interval", "4,12")) == {SamplingConfig(128, 12, 128)}
    assert set(sampling("--policies", "none,bicache+dual")) == {SamplingConfig(128, 16, 32)}
    # Blocks divide the response, and steps are as many for each.
    assert set(sampling("--policies", "none+dual", "--suffix", "200", "--refresh-interval", "7")) == {
        SamplingConfig(96, 9, 32)
    }
    assert set(sampling("--policies", "none+dual", "--suffix", "9")) == {SamplingConfig(4, 4, 4)}


@pytest.mark.full
def test_the_sweep_measures_each_setting_and_draws_it(tmp_path) -> None:
    from scripts import benchmark_sweep

    flags = ["--model", str(golden.FOLDERS["llada"]), "--suffix", "16", "--base", "24,2,1,2", "--steps", "2"]
    flags += ["--prefix", "20,24", "--rows", "2", "--prefixes", "2", "--refresh-interval", "1,2"]
    assert benchmark_sweep.main([*flags, "--boundary", "2", "--repeats", "1", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "benchmark_sweep.json").read_text())
    for axis, results in record["sweeps"].items():
        wanted = {"prefix": {20, 24}, "rows": {2}, "prefixes": {2}, "refresh_interval": {1, 2}}[axis]
        assert {result[axis] for result in results if result["policy"] == "bicache"} == wanted
        assert all(result["tokens_per_s"] > 0 and result["ratio_to_none"] > 0 for result in results)
        assert (tmp_path / f"benchmark_{axis}.png").read_bytes().startswith(b"\x89PNG")
    assert benchmark_sweep.main(["--random", "small", "--base", "1,2", "--output", str(tmp_path)]) == 2


@pytest.mark.full
def test_restarts_are_columns(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(golden.FOLDERS["llada"]), "--policies", "none", "--prefix", "8", "--suffix", "16"]
    status = main(["benchmark", *flags, "--rows", "1", "--steps", "2", "--repeats", "1", "--restart"])
    table = capsys.readouterr().out
    assert status == 0 and "| cold | warm |" in table
    assert all(float(cell.removesuffix(" s")) > 0 for cell in table.splitlines()[-1].strip("| ").split(" | ")[-2:])
