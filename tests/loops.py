"""Loops of a compiled program, by the names that JAX gave them."""

from __future__ import annotations

import re


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
