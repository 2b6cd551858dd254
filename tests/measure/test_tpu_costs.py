"""Costs by the TPU compiler's estimates: how programs are read, and that sums are those that are counted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from bicache_jax.configs import names, topology
from bicache_jax.core.config import BlockCache
from bicache_jax.measure.hlo import Kernel, program

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: libtpu is not installed"
)

_KERNEL = (
    '"custom_call_config":{"cost_estimate":{"flops":"70","transcendentals":"0","bytes_accessed":"9"}},'
    '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"640"}]'
)
TEXT = f"""HloModule jit_f

%fused (p: f32[8]) -> f32[8] {{
  ROOT %add.1 = f32[8]{{0}} add(%p, %p), backend_config={{"estimated_cycles":"999"}}
}}

%inner.body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %fusion.1 = f32[8]{{0:T(8,128)S(1)}} fusion(%a), calls=%fused, backend_config={{"estimated_cycles":"30"}}
  %sum.1 = bf16[4,8]{{1,0:T(8,128)(2,1)}} all-reduce(%fusion.1), replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%fused
  ROOT %tuple.1 = (s32[], f32[8]) tuple(%i, %sum.1)
}}

%branch (p: f32[8]) -> f32[8] {{
  %call.1 = bf16[8]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={{{_KERNEL}}}
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %fusion.2 = (f32[8]{{0}}, s32[]) fusion(%a), calls=%fused, backend_config={{"estimated_cycles":"5"}}
  %while.1 = (s32[], f32[8]{{0:T(8,128)}}) while(%t), body=%inner.body, metadata={{op_name="refresh/while"}}
  %cond.1 = f32[8]{{0}} conditional(%i, %a, %a), branch_computations={{%branch, %fused}}
}}
"""
CHILD = """
import json, sys
from bicache_jax.measure.aot import AotCase
from bicache_jax.measure.tpu_costs import clock, facts, per_step, step_costs
from bicache_jax.serving.flops import summed_bytes
from bicache_jax.wiring import model_shape
size = {"prefix": 128, "suffix": 64, "rows": 2, "per_prefix": 2, "boundary": 3, "gen_length": 32, "block_length": 8}
case = AotCase("small", "v5e:2x2", "data=2,model=2", **size, block_cache=sys.argv[1])
config, (job, costs) = model_shape("small"), step_costs(case)
counted = [summed_bytes(config, job, cost.tokens, refresh=cost.kind == "refresh", itemsize=2) for cost in costs]
found = {"steps": list(map(facts, costs)), "counted": counted, "mean": per_step(costs, job), "clock": clock("v5e:2x2")}
print("FOUND" + json.dumps(found))
"""


def test_a_program_is_read_loop_by_loop() -> None:
    root = program(TEXT)
    assert (root.cycles, root.kernels, root.talk) == (5 + 999, (Kernel(70, 9, 640),), ())
    (loop,) = root.loops
    assert (loop.scope, loop.cycles, loop.kernels) == ("refresh/while", 30, ())
    assert [(one.kind, one.nbytes, one.groups) for one in loop.talk] == [("all-reduce", 64, ((0, 1), (2, 3)))]
    assert list(root.walk()) == [root, loop]


@pytest.mark.parametrize("name", names("topologies"))
def test_sums_take_the_time_of_a_ring(name: str) -> None:
    chip = topology(name)
    links = chip.ici_gb_per_second / chip.ici_ports * 1e9  # of an axis: two, each half of a port's both directions
    assert chip.all_reduce_seconds(1e9, 1) == 0.0
    assert chip.all_reduce_seconds(1e9, 4) == pytest.approx(1.5e9 * chip.devices_per_chip / links)


@pytest.mark.full
@needs_compiler
@pytest.mark.parametrize("block_cache", [pytest.param("off", marks=pytest.mark.full), "dual"])
def test_a_step_sums_what_is_counted(block_cache: BlockCache) -> None:
    """All loops of the compiled program are found, and turn as often as the counts say."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", CHILD, block_cache], capture_output=True, text=True, env=env)
    assert "FOUND" in done.stdout, done.stderr[-2000:]
    found = json.loads(done.stdout.partition("FOUND")[2])
    kinds = [("refresh", 64), ("reuse", 64)]
    if block_cache == "dual":
        kinds = [("refresh", 64), ("refresh", 8), ("reuse", 64), ("reuse", 8)]
    assert [(step["kind"], step["tokens"]) for step in found["steps"]] == kinds
    for step, counted in zip(found["steps"], found["counted"], strict=True):
        assert step["summed"] == 2 * counted  # of two rows
        assert step["seconds"] > step["arithmetic"] > 0 and step["vmem"] > 0 and step["kernels"] > 0
    mean = found["mean"]
    assert 0 < mean["links"] < mean["compute"] < max(step["compute"] for step in found["steps"])
    assert 1.2e9 < found["clock"] < 2e9
