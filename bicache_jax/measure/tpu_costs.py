"""What a step of the decode program costs on a TPU slice that is not here, by the TPU compiler's own estimates.

The compiler estimates cycles for every fusion; kernels state their operations and bytes; for collectives there is the
speed of the links. How often each loop of the program turns in a step follows from the boundary
(`bicache_jax.decoding.forward`). None of it is a measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from bicache_jax.decoding.head import TILE
from bicache_jax.measure.aot import AotCase, compile_decode
from bicache_jax.measure.hlo import Kernel, Loop, compile_with_text, program
from bicache_jax.serving.flops import Job, head_flops, jobs, pass_flops, weight_bytes
from bicache_jax.sharding.topologies import slice_devices
from bicache_jax.wiring import model_shape, topology

_KIND = re.compile(r"/(refresh|reuse)/while$")
_PRODUCT = (4096, 4096, 12288)  # as large as those of an 8B model's MLP


@dataclasses.dataclass(frozen=True)
class StepCost:
    """A step of one kind, on one device.

    Attributes:
        kind: `refresh` or `reuse`.
        tokens: suffix tokens of a row that it runs.
        flops: operations, as counted.
        compute: seconds of everything but kernels and links.
        kernels: seconds of attention.
        links: seconds of sums over the model axis, were nothing else on the links.
        summed: bytes of these sums.
        arithmetic: seconds that the operations take at the peak.
        memory: seconds that reading the weights takes.
        vmem: most vector memory of a kernel, bytes.
    """

    kind: str
    tokens: int
    flops: float
    compute: float
    kernels: float
    links: float
    summed: int
    arithmetic: float
    memory: float
    vmem: int

    @property
    def seconds(self) -> float:
        """The step, nothing overlapped."""
        return self.compute + self.kernels + self.links

    @property
    def bound(self) -> str:
        """What bounds it from below: arithmetic, memory or links."""
        limits = {"arithmetic": self.arithmetic, "memory": self.memory, "links": self.links}
        return max(limits, key=lambda name: limits[name])


@functools.cache
def clock(name: str) -> float:
    """Cycles per second of a slice's devices, by the compiler's estimate for a large product that runs at the peak.

    Raises:
        BicacheError: the compiler is missing, or does not know the slice.
    """
    rows, inner, columns = _PRODUCT
    placed = SingleDeviceSharding(slice_devices(name)[0])
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed) for shape in ((rows, inner), (inner, columns))
    ]
    _, text = compile_with_text(jax.jit(lambda left, right: left @ right).lower(*operands))
    cycles = sum(loop.cycles for loop in program(text).walk())
    return cycles * topology(name).peak("bfloat16") / (2 * rows * inner * columns)


def step_costs(case: AotCase) -> tuple[Job, list[StepCost]]:
    """Compiles a decode program and adds up each kind of its steps.

    Returns:
        The run of each row, and the costs.

    Raises:
        BicacheError: the model, slice or mesh does not exist, or the program does not fit.
    """
    plan, mesh, text = compile_decode(case)
    root = program(text)
    config, chip, split = model_shape(case.config), topology(case.topology), mesh["model"]
    rows, job = len(plan.batches[0].rows), jobs(plan.batches[0].rows, plan.cache)[0]
    peak, bandwidth, hertz = chip.peak("bfloat16"), chip.memory_gb_per_second * 1e9, clock(case.topology)
    head = _head(root, -(-config.vocab_size // split // TILE))
    found = []
    for kind, loops in _kinds(root).items():
        sizes = [job.suffix] if len(loops) == 1 else [job.suffix, job.block]
        # The larger program is the one over the whole suffix.
        for tokens, loop in zip(sizes, sorted(loops, key=lambda loop: -_largest(loop)), strict=True):
            turns = _turns(kind, job.boundary, config.num_layers)
            passed = _sum(loop, turns, rows)
            flops = rows * pass_flops(config, job, tokens, refresh=kind == "refresh", published=False)
            flops = (flops + rows * head_flops(config, job.block)) / split
            found.append(
                StepCost(
                    kind,
                    tokens,
                    flops,
                    (passed.cycles + head) / hertz,
                    sum(max(kernel.flops / peak, kernel.nbytes / bandwidth) for kernel in passed.kernels),
                    chip.all_reduce_seconds(passed.summed, split),
                    passed.summed,
                    flops / peak,
                    weight_bytes(config, jnp.dtype(case.dtype).itemsize) / split / bandwidth,
                    max((kernel.vmem for kernel in passed.kernels), default=0),
                )
            )
    return job, found


@dataclasses.dataclass
class _Sum:
    cycles: float = 0.0
    summed: int = 0
    kernels: list[Kernel] = dataclasses.field(default_factory=list)

    def add(self, loop: Loop, times: int) -> None:
        self.cycles += times * loop.cycles
        self.summed += times * sum(one.nbytes for one in loop.talk if one.kind == "all-reduce")
        self.kernels += loop.kernels * times


def _kinds(root: Loop) -> dict[str, list[Loop]]:
    """The loops of each kind of step: one, or two with a block cache."""
    found: dict[str, list[Loop]] = {"refresh": [], "reuse": []}
    for loop in root.walk():
        if kind := _KIND.search(loop.scope):
            found[kind[1]].append(loop)
    return found


def _largest(loop: Loop) -> int:
    return max((kernel.flops for inner in loop.walk() for kernel in inner.kernels), default=0)


def _turns(kind: str, boundary: int, num_layers: int) -> Callable[[int, int], int]:
    """How often the layer loops of a step turn, by depth (0: the step's own) and place."""
    if kind == "reuse":
        return lambda depth, place: (boundary + 1, num_layers - 1 - boundary)[place]
    return lambda depth, place: num_layers - 2 - boundary if depth else (boundary, 1)[place]


def _sum(step: Loop, turns: Callable[[int, int], int], rows: int) -> _Sum:
    """A step with all turns of its loops."""
    total = _Sum()

    def visit(loop: Loop, times: int, depth: int) -> None:
        total.add(loop, times)
        place = 0
        for inner in loop.loops:
            if any(one.kernels for one in inner.walk()):
                visit(inner, times * turns(depth, place), depth + 1)
                place += 1
            else:  # a block cache is written row by row
                visit(inner, times * rows, depth + 1)

    visit(step, 1, 0)
    return total


def _head(root: Loop, tiles: int) -> float:
    """Cycles of choosing tokens: the head's loop over tiles of the vocabulary, and what is in the step's own loop."""
    cycles = 0.0
    for loop in root.walk():
        if loop.scope.endswith("/head/while"):
            cycles += loop.cycles * tiles
        if any(_KIND.search(inner.scope) for inner in loop.loops):
            cycles += loop.cycles
    return cycles


def per_step(costs: list[StepCost], job: Job) -> dict[str, float]:
    """Mean seconds of a step over a whole run: `compute`, `kernels`, `links` and `roofline`.

    Args:
        costs: of the steps' kinds.
        job: the run of a row.
    """
    total: dict[str, float] = dict.fromkeys(("compute", "kernels", "links", "roofline"), 0.0)
    for (refresh, tokens, _), count in job.passes().items():
        kind = "refresh" if refresh else "reuse"
        cost = next(cost for cost in costs if cost.kind == kind and cost.tokens == tokens)
        for name in ("compute", "kernels", "links"):
            total[name] += count * getattr(cost, name)
        total["roofline"] += count * max(cost.arithmetic, cost.memory)
    return {name: seconds / job.steps for name, seconds in total.items()}


def facts(cost: StepCost) -> dict[str, Any]:
    """A step's cost as a JSON object."""
    return dataclasses.asdict(cost) | {"seconds": cost.seconds, "bound": cost.bound}
