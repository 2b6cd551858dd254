"""Largest planned batches by model, slice and mesh, compared with the TPU compiler's figures.

python scripts/what_fits.py --output scripts/results/what_fits
python scripts/what_fits.py --study one_chip --output scripts/results/one_chip

For each line of the table two programs are compiled for a slice that need not be attached (`bicache aot --rows max`).
Lines that are already in the output are not compiled again. `--beyond` also compiles a batch that is one bucket larger,
to show that it does not fit, or how conservative the planner is.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bicache_jax.cli import EXIT_FAULT
from bicache_jax.configs import topology
from bicache_jax.core.buckets import count_bucket
from bicache_jax.core.config import Quantize
from bicache_jax.core.types import BicacheError
from bicache_jax.measure.aot import GIB, AotCase, check

SLICES = {
    "v5e:2x4": "data=2,model=4",
    "v6e:2x4": "data=8,model=1",
    "v5p:2x2x1": "data=4,model=1",
    "tpu7x:2x2x1": "data=8,model=1",
}
MODELS = ("llada_8b", "dream_7b")
OTHERS = {  # meshes on v5e:2x4
    "qwen3_0_6b": "data=8,model=1",
    "sdar_4b": "data=8,model=1",
    "sdar_8b": "data=2,model=4",
    "llada_moe_7b": "data=2,model=4",
    "llada2_mini": "data=1,model=8",
}
EIGHT_BITS: tuple[Quantize, ...] = ("w8a8", "w8")
CASES: dict[str, list[AotCase]] = {
    "slices": [
        *(
            AotCase(model, where, mesh, rows="max")
            for model, (where, mesh) in itertools.product(MODELS, SLICES.items())
        ),
        *(AotCase(model, "v5e:2x4", mesh, rows="max") for model, mesh in OTHERS.items()),
    ],
    "one_chip": [
        *(
            AotCase(model, where, "data=1,model=1", rows="max", quantize=quantize)
            for model, quantize, where in itertools.product(
                (*MODELS, "sdar_8b", "llada_moe_7b"), EIGHT_BITS, ("v5e:1x1", "v6e:1x1")
            )
        ),
        AotCase("llada_8b", "v5e:2x4", "data=8,model=1", rows="max", quantize="w8a8"),
        AotCase("llada_8b", "v5e:2x4", "data=2,model=4", rows="max"),  # what it competes with
    ],
}
TITLES = {
    "slices": "# What fits where\n\nLargest batches that the planner allows when it may fill all of a device (the"
    " engine fills 92 %). bfloat16, P = 1024, U = 512, 256 response tokens, 16 rows to a prefix, the published"
    " boundary, or half of the layers where there is none; SDAR and LLaDA2 with exact caches. Compiled by the TPU"
    " compiler (`python scripts/what_fits.py --output scripts/results/what_fits`), run"
    " on none of these.",
    "one_chip": "# What fits on one chip, in 8 bits\n\nLargest batches that the planner allows when it may fill all of"
    " a device (the engine fills 92 %). bfloat16 with weights in 8 bits (w8), or also products (w8a8); P = 1024, U ="
    " 512, 256 response tokens, one a step, 16 rows to a prefix, the published boundary, or half of the layers where"
    " there is none; SDAR with exact caches, in blocks of 4. The last lines are eight chips, as eight data shards, and"
    " as two shards of four in bfloat16. Compiled by the TPU compiler (`python scripts/what_fits.py --study one_chip"
    " --output scripts/results/one_chip`), run on none of these. Requests an hour are the roofline's upper bound for"
    " all chips (`bicache_jax/serving/capacity.py`): **an estimate, not a measurement**. Sums: all-reduce instructions"
    " in the decode program.",
}


def case_of(found: dict[str, Any]) -> AotCase:
    """The case of a line."""
    mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    return AotCase(
        found["config"],
        found["topology"],
        mesh,
        rows=found["rows"],
        quantize=found.get("quantize", "none"),
    )


def peak(found: dict[str, Any]) -> int | None:
    """Bytes of the larger program; None if one does not fit."""
    parts = (found["decode"], found["encode"])
    return max(part["peak_bytes"] for part in parts) if found["fits"] else None


def planned(found: dict[str, Any]) -> int:
    """Bytes that the current planner computes for a line."""
    copies = topology(found["topology"]).copies
    return case_of(found).memory(found["rows"], found["mesh"]["model"], copies).total


def requests_per_hour(found: dict[str, Any]) -> float:
    """The roofline's, on all devices of a line."""
    data, split = found["mesh"]["data"], found["mesh"]["model"]
    seconds = case_of(found).seconds(found["rows"], topology(found["topology"]), split)
    return 3600 / seconds * found["rows"] * data


def table(study: str, records: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    heads = [
        "model",
        "slice",
        "mesh",
        "rows a data shard",
        "rows on the slice",
        "compiler, GiB",
        "planned, GiB",
        "HBM, GiB",
    ]
    if study == "one_chip":
        heads[3:3] = ["format"]
        heads += ["sums", "requests an hour"]
    lines = [TITLES[study], "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for found in records:
        mesh, used = found["mesh"], peak(found)
        cells = [found["config"], found["topology"], f"data={mesh['data']},model={mesh['model']}"]
        cells += [found["quantize"]] if study == "one_chip" else []
        cells += [
            str(found["rows"]),
            str(found["rows"] * mesh["data"]),
            "does not fit" if used is None else f"{used / GIB:.2f}",
            f"{planned(found) / GIB:.2f}",
            str(found["hbm_gib"]),
        ]
        if study == "one_chip":
            sums = found["decode"].get("collectives", {}).get("all-reduce", {}).get("instructions", 0)
            cells += [str(sums), f"{requests_per_hour(found):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles what is missing, and writes the table after every line."""
    parser = argparse.ArgumentParser(description="Largest batches that fit, by the TPU compiler.")
    parser.add_argument("--output", type=Path, required=True, help="path without extension; writes .json and .md")
    parser.add_argument("--study", choices=list(CASES), default="slices", help="which lines (default: slices)")
    parser.add_argument("--slices", nargs="+", help="only lines of these slices (default: all)")
    parser.add_argument("--beyond", action="store_true", help="also compile a batch that should not fit")
    args = parser.parse_args(argv)
    file: Path = args.output.with_suffix(".json")
    records: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []

    def key(case: AotCase) -> AotCase:
        return dataclasses.replace(case, rows="max")

    status = 0
    wanted = [case for case in CASES[args.study] if args.slices is None or case.topology in args.slices]
    for case in wanted:
        known = [found for found in records if key(case_of(found)) == case]
        while len(known) < 1 + args.beyond:
            rows = count_bucket(known[0]["rows"] + 1) if known else case.rows
            try:
                known.append(check(dataclasses.replace(case, rows=rows)))
            except BicacheError as error:
                print(f"what_fits: {error}", file=sys.stderr)
                status = EXIT_FAULT
                break
            records.append(known[-1])
            order = [key(one) for one in CASES[args.study]]
            records.sort(key=lambda found: order.index(key(case_of(found))))
            file.write_text(json.dumps(records, indent=1) + "\n")
            args.output.with_suffix(".md").write_text(table(args.study, records))
    return status


if __name__ == "__main__":
    sys.exit(main())
