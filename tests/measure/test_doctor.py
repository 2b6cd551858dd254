"""`bicache doctor`: what it checks, says and returns."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import BicacheError, testing
from bicache_jax.cli import doctor as command
from bicache_jax.cli import main
from bicache_jax.core.types import Model
from bicache_jax.loading import random_model
from bicache_jax.measure import doctor, doctor_full, kernel_times, torch_baseline
from bicache_jax.measure.benchmark import Case, EngineRunner
from bicache_jax.measure.doctor import Check, Clock
from bicache_jax.measure.kernel_times import Shape, Timing, best_rows
from bicache_jax.testing import Candidate, shape_class


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks take seconds to measure, and so do compilers and interpreters."""
    monkeypatch.setattr(doctor, "matmul_peak", lambda dtype: lambda: 2e12)
    monkeypatch.setattr(doctor, "COMPILER_SECONDS", 10**6)
    monkeypatch.setattr(doctor, "INTERPRETED", testing.SMALL_CASES[:1])


@pytest.mark.slow
def test_all_is_well_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--output", str(tmp_path / "devices")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "environment" and lines[-1].startswith("all is well")
    assert not any("WRONG" in line for line in lines)
    kept = json.loads((tmp_path / "devices" / "cpu.json").read_text())
    assert "| versions | ok | python" in (tmp_path / "devices" / "cpu.md").read_text()
    assert kept["ok"]
    found = {(check["part"], check["name"]): check for check in kept["checks"]}
    assert found["environment", "versions"]["facts"]["jax"] == jax.__version__
    assert found["environment", "attention of --attention auto"]["facts"]["serves"] == "xla"
    attention = [check for check in kept["checks"] if check["part"] == "attention"]
    assert {check["facts"]["implementation"] for check in attention} == {"xla", "pallas_tpu", "pallas_gpu"}
    assert all(0 < check["facts"]["error_over_bound"] <= 1 for check in attention)
    assert [name for part, name in found if part == "answers"] == ["none", "bicache", "none+dual", "bicache+dual"]
    assert found["speed", "matrix products, int8"]["detail"] == "2 Top/s"
    assert found["compiler", "decode for a TPU v5e"]["status"] == "skipped"


@pytest.mark.slow
def test_a_broken_kernel_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = testing.prefix_attention

    def broken(*arrays: jax.Array, implementation: str, **settings: Any) -> jax.Array:
        out = right(*arrays, implementation=implementation, **settings)
        if implementation == "pallas_gpu":
            raise RuntimeError("illegal\nmemory access")
        return out.at[-1, 0, 0, 0].add(0.1) if implementation == "pallas_tpu" else out

    monkeypatch.setattr(testing, "prefix_attention", broken)
    monkeypatch.setattr(doctor, "answers", lambda load, recorded: iter(()))  # they compile for half of the time
    assert main(["doctor", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert not record["ok"]
    wrong = {check["name"].split(",")[0]: check["detail"] for check in record["checks"] if check["status"] == "wrong"}
    assert set(wrong) == {"pallas_tpu", "pallas_gpu"}
    assert wrong["pallas_gpu"] == "RuntimeError: illegal memory access"
    assert "of the bound" in wrong["pallas_tpu"]


def test_other_answers_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(command.ANSWERS.read_text())
    record["answers"] = {"none": record["answers"]["none"]}
    record["answers"]["none"][3][0] += 1
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(record))
    from bicache_jax.loading import load_model

    (check,) = doctor.answers(lambda: load_model("example", dtype="float32"), path)
    assert check.status == "wrong" and check.facts["differ"] == [3]
    (check,) = doctor.answers(lambda: load_model("example"), tmp_path / "none.json")
    assert check.status == "wrong" and "none.json" in check.detail


def test_a_spent_budget_skips_and_says_so() -> None:
    found = [*doctor.attention(Clock(-1)), *doctor.speed(Clock(-1)), *doctor.compiler(Clock(-1))]
    assert {check.status for check in found} == {"skipped"}
    assert all("--budget" in check.detail for check in found if check.part != "speed" or "products" in check.name)


FAST = dataclasses.replace(doctor_full.TINY, prefix=16, suffix=16, response=8, block=4)


@pytest.mark.slow
def test_everything_measured_is_kept_when_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After two policies, in the middle of the whole runs."""
    monkeypatch.setattr(doctor, "checks", lambda load, recorded, clock: doctor.environment())
    monkeypatch.setattr(doctor_full, "scale_here", lambda: FAST)
    monkeypatch.setattr(doctor_full, "POLICIES", ("none", "bicache"))
    monkeypatch.setattr(torch_baseline, "missing", lambda model: None)
    monkeypatch.setattr(torch_baseline, "BASELINES", ("torch",))
    monkeypatch.setattr(doctor_full, "TorchRunner", _WithoutTorch)
    flags = ["doctor", "--full", "--output", str(tmp_path)]
    assert main(flags) == 0
    whole = json.loads((tmp_path / "cpu.json").read_text())["checks"]
    names = [check["name"] for check in whole if check["part"] == "runs"]
    assert names == [f"small, 2 rows, {policy}" for policy in ("none", "bicache", "torch")]
    bicache = next(check["facts"] for check in whole if check["name"].endswith(", bicache"))
    assert bicache["ratio_to_none"] > 0 and 0 < bicache["limit_share"] and bicache["rows"] == 2
    timed = [check for check in whole if check["part"] == "kernels" and check["facts"]]
    assert all(check["facts"]["seconds"] > 0 for check in timed) and len(timed) == 4
    details = {check["name"].partition(":")[0]: check for check in whole if check["part"] == "details"}
    assert list(details) == ["dispatch", "compilation", "profile"]
    assert 0 < details["dispatch"]["facts"]["dispatch_s"] < 0.1
    assert details["compilation"]["facts"]["cold_s"] > details["compilation"]["facts"]["warm_s"] > 0
    profile = details["profile"]  # not where another test has loaded the TPU compiler
    assert profile["status"] == "skipped" or profile["facts"]["operations"][0]["seconds"] > 0

    def killed(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_full, "runs", killed)
    assert main(flags) == 130
    kept = json.loads((tmp_path / "cpu.json").read_text())["checks"]
    assert len([check for check in kept if check["part"] == "kernels" and check["facts"]]) == 4


class _WithoutTorch(EngineRunner):
    """Stands in for PyTorch: the same work by this library."""

    def __init__(self, model: Model, case: Case) -> None:
        super().__init__(model, dataclasses.replace(case, policy="none"))


def test_without_torch_the_other_runs_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_baseline.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor_full, "_timed", lambda model, name, cases, clock, bandwidth: iter(cases))
    found = list(doctor_full.runs(lambda name, dtype: random_model(name, dtype=dtype), "small", Clock(60), FAST, 1.0))
    assert [case.policy for case in found[:-1]] == list(doctor_full.POLICIES)
    assert found[-1].status == "skipped" and "torch is not installed" in found[-1].detail


def test_the_fastest_of_each_class_is_a_row() -> None:
    def timing(name: str, form: str, seconds: float | None) -> Timing:
        shape = Shape(name, 8, 1, 32, 32, 128, 1024, 32 if "block" in name else 512, 512)
        limits = shape_class("cuda", shape.num_queries, 128, "bfloat16")
        return Timing(shape, form, seconds, 0.3, {**limits, "form": form})

    found = [
        timing("suffix", "a", 1.0),
        timing("suffix", "b", 1.1),
        timing("no prefix", "a", 4.0),
        timing("no prefix", "b", 2.0),
        timing("no prefix", "c", 1.0),  # did not run on the other shape of its class
        timing("suffix", "c", None),
        timing("block", "d", 0.1),
        Timing(_suffix(), "plain JAX", 0.01),
    ]
    rows = best_rows(found, "cuda")
    assert [(row["max_queries"], row["form"]) for row in rows] == [(32, "d"), (0, "b")]
    assert "no prefix 2000.000 ms" in rows[1]["reason"]


def _suffix() -> Shape:
    return Shape("suffix", 8, 1, 32, 32, 128, 1024, 512, 512)


def test_a_candidate_that_fails_is_no_fault_and_library_attention_that_fails_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(call: Any, inputs: Any, least: float) -> float:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(kernel_times, "seconds", broken)
    monkeypatch.setattr(kernel_times, "candidates", lambda *args: [Candidate("a", {"max_queries": 0}, lambda: None)])
    found = list(doctor_full.kernels(Clock(60), FAST, math.inf, save_tuning=True))
    assert {check.status for check in found if check.name.endswith(": a")} == {"skipped"}
    assert {check.status for check in found if check.name.endswith("plain JAX")} == {"wrong"}
    assert all("out of shared memory" in check.detail for check in found if ": " in check.name)
    assert found[-1].name == "tuning table" and found[-1].status == "skipped"


def test_tuning_needs_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--save-tuning"]) == 2
    assert "--save-tuning needs --full" in capsys.readouterr().err


def test_without_a_device_it_cannot_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", none)
    assert main(["doctor"]) == 2
    assert "jax finds no device: Unable to initialize" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BicacheError, match="--output"):
        doctor.write([Check("speed", "memory", "ok", "")], tmp_path / "file")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_peak_of_each_dtype_can_be_measured(dtype: str) -> None:
    from bicache_jax.measure import benchmark

    assert benchmark.matmul_peak(jnp.dtype(dtype), 64)() > 0


def test_not_a_number_is_never_right() -> None:
    assert testing.error_over_bound(np.asarray([1.0, np.nan]), np.ones(2), "float32") == float("inf")
