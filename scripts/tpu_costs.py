"""Costs of a denoising step on TPU slices, by the TPU compiler's estimates: where the time goes, and what bounds it.

python scripts/tpu_costs.py --output scripts/results/tpu_costs

A decode program is compiled for each line (minutes on two cores); no TPU is needed, and nothing is measured. Lines that
are already in the output are not compiled again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from what_fits import MODELS, SLICES

from bicache_jax import BicacheError
from bicache_jax.measure.aot import AotCase
from bicache_jax.measure.tpu_costs import facts, per_step, step_costs

ROWS = 8


def one(case: AotCase) -> dict[str, Any]:
    """A line of the output."""
    try:
        job, costs = step_costs(case)
    except BicacheError as error:
        return {"error": str(error)}
    return {"boundary": job.boundary, "steps": [facts(cost) for cost in costs], "mean": per_step(costs, job)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """The tables in Markdown."""
    lines = [
        "# What a step costs on TPUs, by their compiler",
        "",
        f"P = 1024, U = 512, 256 response tokens, blocks of 32, {ROWS} rows a data shard over one prefix, bfloat16, the"
        " published boundary. Made by `python scripts/tpu_costs.py`. **Estimates, not measurements:** cycles are those"
        " that the TPU compiler expects of each fusion, converted by what it expects of a large matrix product at the"
        " documented peak; attention is the larger of its kernel's operations / peak and bytes / bandwidth; sums over"
        " the model axis go at the documented speed of the links of one axis, with nothing overlapped (the compiled"
        " programs overlap none). Floor: the larger of counted operations / peak and weights / bandwidth.",
        "",
        "| model | slice | mesh | block cache | step | tokens a row | ms | attention | links (MiB) | floor |"
        " floor / ms | bound by |",
        "|" + "---|" * 12,
    ]
    for record in records:
        name = " | ".join(record[field] for field in ("config", "topology", "mesh", "block_cache"))
        if "error" in record:
            lines.append(f"| {name} | {record['error']}" + " | " * 7 + "|")
            continue
        for step in record["steps"]:
            floor = max(step["arithmetic"], step["memory"])
            cells = [
                step["kind"],
                str(step["tokens"]),
                f"{1e3 * step['seconds']:.1f}",
                f"{1e3 * step['kernels']:.1f}",
                f"{1e3 * step['links']:.1f} ({step['summed'] / 2**20:.0f})",
                f"{1e3 * floor:.1f}",
                f"{floor / step['seconds']:.2f}",
                step["bound"],
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## A whole run, the mean of its steps",
        "",
        "| model | slice | mesh | block cache | ms a step | attention | links | floor / ms |",
        "|" + "---|" * 8,
    ]
    for record in records:
        if "error" in record:
            continue
        name = " | ".join(record[field] for field in ("config", "topology", "mesh", "block_cache"))
        mean = record["mean"]
        total = mean["compute"] + mean["kernels"] + mean["links"]
        shares = " | ".join(f"{mean[part] / total:.0%}" for part in ("kernels", "links"))
        lines.append(f"| {name} | {1e3 * total:.1f} | {shares} | {mean['roofline'] / total:.2f} |")
    vmem = max((step["vmem"] for record in records for step in record.get("steps", ())), default=0)
    lines += ["", f"No attention kernel uses more than {vmem / 2**20:.1f} MiB of vector memory."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the study; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--slices", nargs="+", choices=list(SLICES), help="only lines of these slices (default: all)")
    args = parser.parse_args()
    kept = args.output.with_suffix(".json")
    records: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    known = {tuple(record[field] for field in ("config", "topology", "mesh", "block_cache")) for record in records}
    for config, (where, mesh), cache in itertools.product(MODELS, SLICES.items(), ("off", "dual")):
        key = (config, where, mesh, cache)
        if key in known or where not in (args.slices or SLICES):
            continue
        case = AotCase(config, where, mesh, rows=ROWS, block_cache=cache)  # type: ignore[arg-type]
        records.append(dict(zip(("config", "topology", "mesh", "block_cache"), key, strict=True)) | one(case))
        kept.write_text(json.dumps(records, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(table(records))
        print(key, records[-1].get("error", "done"), file=sys.stderr, flush=True)
    args.output.with_suffix(".md").write_text(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
