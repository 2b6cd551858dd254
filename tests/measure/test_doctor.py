"""`bicache doctor`: what it checks, says and returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import BicacheError, testing
from bicache_jax.cli import doctor as command
from bicache_jax.cli import main
from bicache_jax.measure import doctor
from bicache_jax.measure.doctor import Check, Clock


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks take seconds to measure, and so do compilers and interpreters."""
    monkeypatch.setattr(doctor, "matmul_peak", lambda dtype: lambda: 2e12)
    monkeypatch.setattr(doctor, "COMPILER_SECONDS", 10**6)
    monkeypatch.setattr(doctor, "INTERPRETED", testing.SMALL_CASES[:1])


def test_all_is_well_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--output", str(tmp_path / "devices")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "environment" and lines[-1].startswith("all is well")
    assert not any("WRONG" in line for line in lines)
    kept = json.loads((tmp_path / "devices" / "cpu.json").read_text())
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


def test_a_broken_kernel_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = testing.prefix_attention

    def broken(*arrays: jax.Array, implementation: str, **settings: Any) -> jax.Array:
        out = right(*arrays, implementation=implementation, **settings)
        if implementation == "pallas_gpu":
            raise RuntimeError("illegal\nmemory access")
        return out.at[-1, 0, 0, 0].add(0.1) if implementation == "pallas_tpu" else out

    monkeypatch.setattr(testing, "prefix_attention", broken)
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
