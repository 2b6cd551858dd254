"""Compiled programs, read from their HLO text: collectives, loops, and what a TPU compiler expects them to cost."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_INSTRUCTION = re.compile(rf"= (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_LISTED = re.compile(r"replica_groups=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<pairs>(?:\{\d+,\d+\},?)*)\}")
_ARRAY = re.compile(r"(?P<kind>pred|[a-z]+)(?P<bits>\d*)\[(?P<shape>[\d,]*)\]")

_HEADER = re.compile(r"^(?:ENTRY )?%(?P<name>\S+) \(.*\{$")
_OPCODE = re.compile(r"^\s+(?:ROOT )?%(?P<name>\S+) = .*? (?P<opcode>[a-z][a-z0-9-]*)\(")
_CALLED = re.compile(r"(?:body|to_apply|true_computation|false_computation)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ESTIMATE = re.compile(r'"cost_estimate":\{[^}]*\}')
_SCRATCH = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: its opcode.
        groups: the devices that take part together, by place in the mesh; empty: all of them.
        nbytes: bytes of its result on a device.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    nbytes: int


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    if found := _LISTED.search(line) or _PAIRS.search(line):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", found[0]))
    if found := _IOTA.search(line):
        devices = np.arange(math.prod(_numbers(found["dims"]))).reshape(_numbers(found["dims"]))
        if found["order"]:
            devices = devices.transpose(_numbers(found["order"]))
        return tuple(tuple(map(int, group)) for group in devices.reshape(_numbers(found["shape"])))
    return ()


def _nbytes(text: str) -> int:
    sizes = []
    for found in _ARRAY.finditer(text):
        bits = 8 if found["kind"] == "pred" else int(found["bits"] or 0)
        sizes.append(bits * math.prod(_numbers(found["shape"])) // 8)
    return sum(sizes)


def collectives(text: str) -> list[Collective]:
    """Reads the collectives of a program, or of some of its lines.

    Args:
        text: what `compiled.as_text()` gives.

    Returns:
        One entry an instruction; one in a loop is counted once, however often the loop turns.
    """
    return [
        Collective(found["kind"], _groups(line), _nbytes(found["type"]))
        for line in text.splitlines()
        if (found := _INSTRUCTION.search(line))
    ]


def crossing(found: Sequence[Collective], mesh_shape: tuple[int, ...]) -> list[Collective]:
    """Collectives between devices of different data shards of a mesh `("data", "model")`."""
    data, model = mesh_shape
    if data == 1:
        return []
    return [
        one
        for one in found
        if not one.groups or any(len({device // model for device in group}) > 1 for group in one.groups)
    ]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of Pallas in a program.

    Attributes:
        flops: operations, as the kernel says.
        nbytes: bytes that it moves, likewise.
        vmem: bytes of vector memory that the compiler gives it.
    """

    flops: int
    nbytes: int
    vmem: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a program, or the program itself: what one turn costs, the loops in it left out.

    Attributes:
        scope: where it was traced, from the outside to the inside.
        cycles: the compiler's estimate for everything but kernels and collectives.
        kernels: kernels in the order of the program.
        talk: collectives, likewise.
        loops: the loops in it, likewise.
    """

    scope: str
    cycles: int
    kernels: tuple[Kernel, ...]
    talk: tuple[Collective, ...]
    loops: tuple[Loop, ...]

    def walk(self) -> Iterator[Loop]:
        """The loop and all loops in it."""
        yield self
        for loop in self.loops:
            yield from loop.walk()


def compile_with_text(lowered: Any) -> tuple[Any, str]:
    """Compiles a program, and returns it with its HLO as the compiler itself writes it.

    jaxlib's `as_text` fails on programs of TPU compilers that are newer than it.

    Args:
        lowered: what `jit(...).lower(...)` gives, for a TPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        written = sorted(Path(folder).glob("**/*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        return compiled, written[-1].read_text(encoding="utf-8") if written else str(compiled.as_text())


def program(text: str) -> Loop:
    """Reads a program for TPUs.

    Args:
        text: of `compile_with_text`.
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = "", list[str]()
    for line in text.splitlines():
        if found := _HEADER.match(line):
            lines = bodies.setdefault(found["name"], [])
            entry = found["name"] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return _read(bodies, entry, "")


def _read(bodies: dict[str, list[str]], name: str, scope: str) -> Loop:
    """A computation with those that it calls; of a conditional's branches, all, since usually one has work."""
    cycles, kernels, talk, loops = 0, list[Kernel](), list[Collective](), list[Loop]()
    for line in bodies[name]:
        found = _OPCODE.match(line)
        if found is None:
            continue
        opcode = found["opcode"]
        if collective := collectives(line):
            talk += collective
        elif "tpu_custom_call" in line and opcode == "custom-call":
            estimate, scratch = _ESTIMATE.search(line), _SCRATCH.search(line)
            known = dict(re.findall(r'"(\w+)":"(\d+)"', estimate[0])) if estimate else {}
            flops, nbytes = (int(known.get(name, 0)) for name in ("flops", "bytes_accessed"))
            kernels.append(Kernel(flops, nbytes, int(scratch[1]) if scratch else 0))
        elif opcode == "while":
            where = _SCOPE.search(line)
            body = re.search(r"body=%([\w.-]+)", line)
            assert body is not None
            loops.append(_read(bodies, body[1], where[1] if where else ""))
        elif opcode in ("conditional", "call"):
            listed = _BRANCHES.search(line)
            called = re.findall(r"%([\w.-]+)", listed[1]) if listed else _CALLED.findall(line)
            for part in (_read(bodies, one, scope) for one in called):
                cycles += part.cycles
                kernels += part.kernels
                talk += part.talk
                loops += part.loops
        elif estimated := _CYCLES.search(line):
            cycles += int(estimated[1])
    return Loop(scope, cycles, tuple(kernels), tuple(talk), tuple(loops))
