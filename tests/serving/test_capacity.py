"""Plans from shapes alone: devices as data, memory as devices and the planner have it, estimates that can be redone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bicache_jax import BicacheError
from bicache_jax.cli import main
from bicache_jax.configs import device, device_of, names, topology
from bicache_jax.serving.capacity import GIB, Shape, capacity, describe
from bicache_jax.serving.flops import attention_flops, row_flops

RESULTS = Path(__file__).parents[2] / "scripts" / "results"
LLADA = Shape("llada_8b", prefix=1024, suffix=512, rows=16)


@pytest.mark.parametrize("name", [*names("gpus"), *names("topologies")])
def test_devices_say_what_a_plan_needs(name: str) -> None:
    chip, count = device(name)
    assert chip.source.startswith("https://") and all(device_of(kind) == chip for kind in chip.device_kinds)
    assert 8 < chip.memory_gib < 256 and 100 < chip.memory_gb_per_second < 10_000
    assert 5e13 < chip.peak(chip.dtype) < 5e15 and count == getattr(chip, "devices_per_chip", 1)
    assert chip.tera_per_second.get("int8", 2 * chip.tera_per_second[chip.dtype]) > chip.tera_per_second[chip.dtype]


def test_names_of_devices() -> None:
    assert device("t4")[0].dtype == "float16" and device("l4")[0].dtype == "bfloat16"
    assert [device(name)[1] for name in ("v5e-1", "v5e-8", "v5e:2x4", "h100-4", "tpu7x:2x2x1")] == [1, 8, 8, 4, 8]
    for name in ("t5", "v5e-0", "v5e-", "v5e:axb", ""):
        with pytest.raises(BicacheError, match="devices are a100, a100_80gb, h100"):
            device(name)


@pytest.mark.parametrize("policy", ["none", "bicache", "none+dual", "bicache+dual"])
def test_memory_is_what_an_h200_took(policy: str) -> None:
    """Measured peaks of whole runs of eight rows, in bfloat16."""
    runs = {run["policy"]: run for run in json.loads((RESULTS / "devices" / "nvidia_h200.json").read_text())["runs"]}
    name, _, block_cache = policy.partition("+")
    boundary = 14 if name == "bicache" else None
    shape = dataclasses.replace(LLADA, policy=name, block_cache=block_cache or "off", boundary=boundary)
    found = shape.memory(8, 1, device("h200")[0].copies).total
    assert found == pytest.approx(runs[policy]["memory_bytes"], rel=0.02)


def test_it_is_the_planner_of_aot() -> None:
    recorded = json.loads((RESULTS / "what_fits.json").read_text())[0]
    shape = dataclasses.replace(LLADA, rows=recorded["rows"])
    found = capacity(shape, recorded["topology"], "data=2,model=4")
    assert (found["total"], found["boundary"]) == (recorded["planned_bytes"], recorded["boundary"])
    assert found["usable"] < found["memory"] == int(recorded["hbm_gib"] * GIB)


def test_eight_bits_on_small_devices() -> None:
    half = dataclasses.replace(LLADA, rows="max", dtype="float16", quantize="w8")
    found = capacity(half, "t4")
    assert found["fits"] and found["rows"] == found["largest_rows"] > 1 and found["weights"] < 7.6 * GIB
    assert capacity(half, "t4", share=0.95)["largest_rows"] > found["largest_rows"]
    assert f"{found['rows']} rows over 1 prefix, in all" in describe(found)
    with pytest.raises(BicacheError, match="llada_8b on t4: one row needs 15.* of which 14.9 are weights, and 10.4"):
        capacity(dataclasses.replace(half, quantize="none"), "t4")
    whole = capacity(dataclasses.replace(LLADA, quantize="w8a8"), "v5e-1")
    assert whole["fits"] and whole["largest_rows"] >= 16


def test_requests_an_hour_can_be_redone_by_hand() -> None:
    """Many rows are bound by arithmetic alone; eight data shards serve eight times as many."""
    chip = topology("v5e")
    shape = dataclasses.replace(LLADA, rows=32, policy="none")
    job, config = shape.job(32), shape.model
    seconds = 32 * row_flops(config, job) / 197e12
    assert shape.seconds(32, chip, 1) == pytest.approx(seconds)
    attention = 32 * job.steps * config.num_layers * attention_flops(config, 1536, 1536)
    integers = dataclasses.replace(shape, quantize="w8a8").seconds(32, chip, 1)
    assert integers == pytest.approx((seconds * 197e12 - attention) / 393e12 + attention / 197e12)
    one, eight = (capacity(dataclasses.replace(LLADA, quantize="w8a8"), where) for where in ("v5e-1", "v5e-8"))
    assert eight["requests_per_hour"] == pytest.approx(8 * one["requests_per_hour"], rel=1e-3)
    split = capacity(LLADA, "v5e-8", "data=2,model=4")
    assert eight["requests_per_hour"] > split["requests_per_hour"]
    links = capacity(LLADA, "l4-4", "model=4")
    assert links["requests_per_hour"] is None and "no links" in links["no_estimate"]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--config", "llada_8b", "--device", "v5e-1", "--quantize", "w8a8", "--gen-length", "256"]
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["dtype"], found["steps"]) == (16, "bfloat16", 256)
    assert main([*flags, "--rows", "64"]) == 1 and "64 rows do not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--config", "llada_8b"], "--config needs --device, too"),
        (["--prefix", "9"], "--prefix needs --config, too"),
        (["--config", "llada_8b", "--device", "t5"], "--device 't5': devices are"),
        (["--config", "llada_9b", "--device", "t4"], "no model shape 'llada_9b'"),
        (["--config", "llada_8b", "--device", "t4", "--threshold", "0.9"], "--threshold has no place"),
        (["--config", "llada_8b", "--device", "t4", "--mesh", "model=2"], "--mesh model=2: needs 2 devices, t4 has 1"),
        (["--config", "sdar_8b", "--device", "l4", "--policy", "bicache"], "block-causal"),
        ([], "plan needs --model, or --config and --device"),
    ],
)
def test_bad_flags_are_one_line(flags: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    err = capsys.readouterr().err
    assert fault in err and err.count("\n") == 1
