"""Loops of a compiled program, by the names that JAX gave them, and what is copied in them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

MIB = 1 << 20
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def taken_out(text: str, loop: str) -> list[str]:
    """Loops that were traced inside `loop` and stand beside it in the compiled program.

    A compiler may take what never changes in a loop out of it, though the loop may not turn at all.

    Args:
        text: what `compiled.as_text()` gives.
        loop: the end of the loop's name, `reuse/while` for example.
    """
    loops: dict[str, list[str]] = {}
    computation = ""
    for line in text.splitlines():
        if line.endswith("{"):
            computation = line.split()[0]
        elif " while(" in line and (name := re.search(r'op_name="([^"]*)"', line)):
            loops.setdefault(computation, []).append(name[1])
    beside = [names for names in loops.values() if any(name.endswith(loop) for name in names)]
    assert beside, f"no loop {loop}"
    return [name for names in beside for name in names if f"{loop}/body/" in name]


def copies(hlo: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Copies of 1 MiB or more inside loops: (computation, dimensions).

    A copy into or out of VMEM with the layout as it was is how a TPU reads and writes, and a fusion whose result is its
    operand is how a product reads 8-bit weights in tiles of another size; any other one is counted.
    """
    bodies = _loops(hlo) - set(re.findall(r"output_to_operand_aliasing=\{\{\}: \(0, \{\}\)\}, calls=%([\w.\-]+)", hlo))
    computation = None
    for line in hlo.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = found[1]
        if computation not in bodies:
            continue
        found = re.match(r"\s+(?:ROOT )?%[\w.\-]+ = (\(?)(\w+)\[([\d,]*)\]\{([^}]*)\}(.*)", line)
        if found is None:
            continue
        opened, dtype, sizes, layout, rest = found.groups()
        shape = tuple(int(size) for size in sizes.split(",") if size)
        if math.prod(shape) * _BYTES.get(dtype, 8) < MIB:
            continue
        if opened and " copy-start(" in rest:
            source = re.match(r", \w+\[[\d,]*\]\{([^}]*)\}", rest)
            assert source is not None
            if re.sub(r"S\(\d+\)", "", layout) == re.sub(r"S\(\d+\)", "", source[1]):
                continue
        elif opened or not re.match(r" (copy|transpose)\(", rest):
            continue
        yield computation, shape


def _loops(hlo: str) -> set[str]:
    """Computations that run inside a while loop."""
    calls: dict[str, set[str]] = {}
    roots: set[str] = set()
    computation = ""
    for line in hlo.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = found[1]
            calls[computation] = set()
        named = re.findall(r"(?:body|calls|to_apply|branch_computations|async_wrapped)=\{?%?([\w.\-, %]+)", line)
        targets = {name.strip(" %") for group in named for name in group.split(",")}
        calls.get(computation, set()).update(targets)
        roots.update(re.findall(r"\bbody=%?([\w.\-]+)", line))
    inside: set[str] = set()
    while roots:
        name = roots.pop()
        if name not in inside:
            inside.add(name)
            roots |= calls.get(name, set())
    return inside
