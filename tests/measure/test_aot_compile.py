"""The ahead-of-time check: real shapes through the TPU compiler, and the planner beside its figures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from bicache_jax.configs import model_shape, names, topology, topology_of
from bicache_jax.core.buckets import count_bucket
from bicache_jax.models import abstract
from bicache_jax.serving.memory import Buffers, Footprint, params_bytes
from bicache_jax.sharding import Partition

SCRIPT = Path(__file__).parents[2] / "scripts" / "aot_compile.py"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: libtpu is not installed"
)


def run(*flags: str) -> tuple[int, str, str]:
    """Runs the script in a process of its own: the TPU compiler prints to file descriptors."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, env=env)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@needs_compiler
def test_llada_8b_compiles_for_eight_chips_and_fits_as_planned() -> None:
    flags = ("--config", "llada_8b", "--topology", "v5e:2x4", "--mesh", "data=2,model=4", "--rows", "8", "--json")
    status, out, err = run(*flags, "--prefix", "1024", "--suffix", "512", "--per-prefix", "4", "--boundary", "16")
    assert status == 0, err
    found = json.loads(out[out.index("{") :])
    decode = found["decode"]
    assert found["fits"] and found["encode"]["fits"]
    assert decode["collectives"]["all-reduce"]["instructions"] > 0
    assert decode["collectives_over_data"] == found["encode"]["collectives_over_data"] == 0
    assert decode["arguments_bytes"] < decode["peak_bytes"] < found["hbm_gib"] * 2**30
    assert found["planned_bytes"] == pytest.approx(decode["peak_bytes"], rel=0.1)


def test_the_planner_agrees_with_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against recorded figures, at the largest batches that are planned: both models on every generation."""
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    import what_fits

    records = json.loads((SCRIPT.parent / "results" / "what_fits.json").read_text())
    fitting = [found for found in records if found["fits"]]
    cases = {(found["config"], found["topology"].split(":")[0]) for found in fitting}
    assert cases == {(model, name) for model in ("llada_8b", "dream_7b") for name in names("topologies")}
    for found in fitting:
        assert what_fits.planned(found) == pytest.approx(found["decode"]["peak_bytes"], rel=0.1), found["topology"]
        assert what_fits.planned(found) <= topology(found["topology"]).hbm_gib * 2**30


def test_most_rows_is_the_last_bucket_that_fits() -> None:
    layout = Partition(model_shape("llada_8b"), 4)
    weights = params_bytes(abstract(layout.config, jnp.bfloat16)) // 4
    device = Footprint(layout.local, weights, Buffers(shallow=20, deep=16, slots=1), jnp.dtype(jnp.bfloat16))
    shape = {"prefix": 1024, "suffix": 512}
    limit = topology("v5e:2x4").hbm_gib * 2**30
    rows = device.most_rows(limit, **shape)

    def total(rows: int) -> int:
        return device.memory(groups=count_bucket(rows), rows=rows, **shape).total

    assert total(rows) <= limit < total(count_bucket(rows + 1))
    assert device.most_rows(weights, **shape) == 0


@pytest.mark.parametrize("name", names("topologies"))
def test_topologies_say_what_a_plan_needs(name: str) -> None:
    chip = topology(f"{name}:2x2")
    assert chip.platform == name and chip.hbm_gib > 8 and chip.source.startswith("https://")
    assert topology_of(chip.device_kind) == chip and topology_of("cpu") is None
    assert 100 < chip.tflops_bfloat16 < 5000 and 500 < chip.hbm_gb_per_second < 10000


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (("--config", "llada_9b", "--topology", "v5e:2x4", "--mesh", "model=4"), "llada_9b"),
        (("--config", "llada_8b", "--topology", "v9z:2x4", "--mesh", "model=4"), "v9z"),
        (("--config", "llada_8b", "--topology", "v5e:2x4"), "--mesh"),
    ],
)
def test_bad_arguments_are_one_line(flags: tuple[str, ...], fault: str) -> None:
    status, out, err = run(*flags)
    assert status == 2 and not out
    (line,) = err.splitlines()
    assert fault in line
