"""Largest planned batches by model, slice and mesh, compared with the TPU compiler's figures.

python scripts/what_fits.py --output scripts/results/what_fits

For each line of the table two programs are compiled for a slice that need not be attached (`bicache aot --rows max`).
Lines that are already in the output are not compiled again. `--beyond` also compiles a batch that is one bucket larger,
to show that it does not fit, or how conservative the planner is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from bicache_jax.cli import EXIT_FAULT
from bicache_jax.configs import model_shape, topology
from bicache_jax.core.buckets import count_bucket
from bicache_jax.core.types import BicacheError
from bicache_jax.measure.aot import GIB, AotCase, check
from bicache_jax.serving.memory import Footprint
from bicache_jax.sharding import Partition

MODELS = ("llada_8b", "dream_7b")
MESHES = {
    "v5e:2x4": "data=2,model=4",
    "v6e:2x4": "data=8,model=1",
    "v5p:2x2x1": "data=4,model=1",
    "tpu7x:2x2x1": "data=8,model=1",
}


def one(config: str, slice_name: str, rows: int | None) -> dict[str, Any]:
    """Runs a compile check."""
    return check(AotCase(config, slice_name, MESHES[slice_name], rows=rows))


def peak(found: dict[str, Any]) -> int | None:
    """Bytes of the larger program; None if one does not fit."""
    parts = (found["decode"], found["encode"])
    return max(part["peak_bytes"] for part in parts) if found["fits"] else None


def planned(found: dict[str, Any]) -> int:
    """Bytes that the current planner computes for a line."""
    partition = Partition(model_shape(found["config"]), found["mesh"]["model"])
    size = {"groups": found["prefixes"], **{key: found[key] for key in ("rows", "prefix", "suffix")}}
    dtype, copies = jnp.dtype(jnp.bfloat16), topology(found["topology"]).copies
    return Footprint.of(partition, [found["boundary"]], dtype, copies=copies).memory(**size).total


def table(records: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "# What fits where",
        "",
        "Largest batches that the planner allows when it may fill all of a device (the engine fills 92 %). bfloat16,"
        " P = 1024, U = 512, 256 response tokens, 16 rows to a prefix, the published boundary. Compiled by the TPU"
        " compiler (`python scripts/what_fits.py --output scripts/results/what_fits`), run on none of these.",
        "",
        "| model | slice | mesh | rows a data shard | rows on the slice | compiler, GiB | planned, GiB | HBM, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in records:
        mesh, used = found["mesh"], peak(found)
        lines.append(
            f"| {found['config']} | {found['topology']} | data={mesh['data']},model={mesh['model']} | {found['rows']} "
            f"| {found['rows'] * mesh['data']} | {'does not fit' if used is None else f'{used / GIB:.2f}'} "
            f"| {planned(found) / GIB:.2f} | {found['hbm_gib']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles what is missing, and writes the table after every line."""
    parser = argparse.ArgumentParser(description="Largest batches that fit, by the TPU compiler.")
    parser.add_argument("--output", type=Path, required=True, help="path without extension; writes .json and .md")
    parser.add_argument("--slices", nargs="+", default=list(MESHES), choices=list(MESHES), help="default: all")
    parser.add_argument("--beyond", action="store_true", help="also compile a batch that should not fit")
    args = parser.parse_args(argv)
    file: Path = args.output.with_suffix(".json")
    records: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for config, slice_name in itertools.product(MODELS, args.slices):
        known = [found for found in records if (found["config"], found["topology"]) == (config, slice_name)]
        while len(known) < 1 + args.beyond:
            try:
                known.append(one(config, slice_name, count_bucket(known[0]["rows"] + 1) if known else None))
            except BicacheError as error:
                print(f"what_fits: {error}", file=sys.stderr)
                return EXIT_FAULT
            records.append(known[-1])
            file.write_text(json.dumps(records, indent=1) + "\n")
            args.output.with_suffix(".md").write_text(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
