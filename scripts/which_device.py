"""Which device holds which model: rows of the largest batches by the planner, from shapes alone.

python scripts/which_device.py --output scripts/results/which_device.md

Nothing is compiled and no device is needed (`bicache plan --config NAME --device NAME`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bicache_jax.core.config import Quantize
from bicache_jax.core.types import BicacheError
from bicache_jax.serving.capacity import Shape, capacity
from bicache_jax.wiring import device

MODELS = ("qwen3_0_6b", "sdar_4b", "llada_8b", "dream_7b", "sdar_8b", "llada_moe_7b", "llada2_mini")
DEVICES = ("t4", "l4", "a100", "a100_80gb", "h100", "h200", "v5e", "v6e", "v5p", "v5e-8")
FORMATS: tuple[Quantize, ...] = ("none", "w8")
ENOUGH = 4
"""Rows below which the smaller format is shown, where it holds more."""
TITLE = """# Which device for which model

Rows of the largest batch that the planner allows (on `v5e-8`: of all shards; it fills 92 %), at P = 1024, U = 512, 16
rows to a prefix, with the policy of the family (BiCache with the published boundary, or half of the layers where there
is none; exact caches for SDAR and LLaDA2). In bfloat16 (float16 on a T4), or with weights in 8 bits (w8) where fewer
than four rows would fit. GPUs with 75 % of their memory, as JAX takes it; `--memory-share` says otherwise. From shapes
alone (`python scripts/which_device.py --output scripts/results/which_device.md`): a run of LLaDA-8B on an H200 agreed;
nothing else here has run.
"""


def ways(name: str) -> list[tuple[Quantize, str]]:
    """Formats and meshes to try, the preferred one first."""
    meshes = ("data=8,model=1", "data=2,model=4", "data=1,model=8") if "-" in name else ("",)
    return [(quantize, mesh) for quantize in FORMATS for mesh in meshes]


def cell(model: str, name: str) -> str:
    """Rows of a model on a device, and in which format and on which mesh; `-` where not even one fits."""
    chip, _ = device(name)
    best = (0, "-")
    for quantize, mesh in ways(name):
        try:
            found = capacity(Shape(model, rows="max", dtype=chip.dtype, quantize=quantize), name, mesh)
        except BicacheError:  # not one row fits, or the heads cannot be cut like this
            continue
        words = (str(found["largest_rows_all_shards"]), "w8" if quantize == "w8" else "", mesh)
        best = max(best, (found["largest_rows"], ", ".join(filter(None, words))), key=lambda kept: kept[0])
        if best[0] >= ENOUGH:
            break
    return best[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the table."""
    parser = argparse.ArgumentParser(description="Rows of the largest batches, by model and device.")
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file to write")
    args = parser.parse_args(argv)
    lines = [TITLE, "| model | " + " | ".join(DEVICES) + " |", "|" + "---|" * (1 + len(DEVICES))]
    lines += [f"| {model} | " + " | ".join(cell(model, name) for name in DEVICES) + " |" for model in MODELS]
    args.output.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
