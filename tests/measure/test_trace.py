"""Profiles summed up: own time, idle time, and a real trace of a program."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bicache_jax.measure.trace import summary

TRACED = """
import jax, jax.numpy as jnp
from bicache_jax.measure import trace
assert trace.unsafe() is None
run = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda _, x: jnp.tanh(x @ x), x))
x = jnp.ones((256, 256))
run(x)
seen = trace.traced(lambda: run(x))
names = {operation.name: operation.count for operation in seen.operations}
assert 0 < seen.busy <= seen.span and any(count >= 9 for count in names.values()), names
print("traced")
"""


def test_own_time_and_idle_time() -> None:
    loop = [("while.3", 0.0, 100.0), ("fusion.1", 10.0, 30.0), ("fusion.2", 50.0, 20.0), ("end: fusion", 60.0, 5.0)]
    other = [("copy", 120.0, 40.0), ("copy.1.2", 150.0, 30.0)]
    found = summary([loop, other])
    assert found is not None
    seconds = {operation.name: (round(operation.seconds * 1e9), operation.count) for operation in found.operations}
    assert seconds == {"while": (50, 1), "fusion": (50, 2), "copy": (40, 2)}
    assert round(found.span * 1e9) == 180 and round(found.busy * 1e9) == 160
    assert found.idle == pytest.approx(20 / 180)
    assert summary([[], [("nothing", 5.0, 0.0)]]) is None


def test_a_program_is_traced() -> None:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, env=env)
    assert done.stdout == "traced\n", done.stderr[-2000:]
