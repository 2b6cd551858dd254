"""Estimates memory and throughput of TPU slices from shapes: memory from the planner, time from the roofline.

python scripts/scaling_study.py --output scripts/results/scaling.md
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from bicache_jax.configs import topology
from bicache_jax.serving.capacity import GIB, Shape
from bicache_jax.serving.flops import row_flops
from bicache_jax.serving.memory import RESERVE

PREFIX, SUFFIX, RESPONSE, BLOCK, PER_PREFIX = 1024, 512, 256, 32, 16


def shape_of(name: str) -> Shape:
    """The batches of this study."""
    return Shape(name, prefix=PREFIX, suffix=SUFFIX, per_prefix=PER_PREFIX, gen_length=RESPONSE, block_length=BLOCK)


def requests_per_hour(
    name: str, generation: str, chips: int, model: int, rows: int, *, cached: bool, links: bool = True
) -> float:
    """Upper bound for a slice: `Shape.seconds`."""
    chip, shape = topology(generation), shape_of(name)
    job = shape.job(rows)
    job = dataclasses.replace(job if cached else job.without_prefix(), rows_per_prefix=PER_PREFIX)
    seconds = shape.seconds(rows, chip, model, job=job, links=links)
    return 3600 / seconds * rows * chips * chip.devices_per_chip / model


def study() -> str:
    """The study as Markdown."""
    lines = [
        "# Scaling, from shapes",
        "",
        f"bfloat16, P = {PREFIX}, U = {SUFFIX}, {RESPONSE} response tokens in {RESPONSE} steps, blocks of {BLOCK}, N ="
        f" 16, {PER_PREFIX} rows to a prefix, the published boundary. Made by `python scripts/scaling_study.py`. Memory"
        " is the planner's; requests an hour are the roofline's upper bound (per pass peak arithmetic or memory"
        " traffic, then the sums over the model axis at the documented speed of the links of one axis, since compiled"
        " programs overlap nothing with them): **an estimate, not a measurement**.",
        "",
        "## Memory (GiB) and work of a v5e device, LLaDA-8B",
        "",
        "| model axis | rows | prefixes | parameters | shared KV | KV by row | activations | total | TFLOP a batch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shape, chip = shape_of("llada_8b"), topology("v5e")
    for model, rows, groups in [
        (1, 1, 1),
        (2, 4, 1),
        (4, 8, 1),
        (4, 8, 8),
        (4, 16, 1),
        (4, 32, 2),
        (8, 32, 2),
        (8, 64, 4),
    ]:
        sized = dataclasses.replace(shape, per_prefix=rows // groups)
        found = sized.memory(rows, model, chip.copies)
        parts = (found.params, found.prefixes, found.deep, found.activations, found.total)
        work = rows * row_flops(shape.model, sized.job(rows)) / model
        sizes = " | ".join(f"{part / GIB:.2f}" for part in parts)
        lines.append(f"| {model} | {rows} | {groups} | {sizes} | {work / 1e12:,.0f} |")
    lines += [
        "",
        "More data shards change nothing on a device: each has prefixes and rows of its own. What the TPU compiler says"
        " at the largest batches is beside the planner's figures in `what_fits.md`.",
        "",
        "## Requests an hour, at the largest batch that is planned to fit",
        "",
        "| model | slice | mesh | rows a shard | bicache | none | ratio | bicache, were links free |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("llada_8b", "dream_7b"):
        for generation, model in (("v5e", 4), ("v6e", 1), ("v6e", 2)):
            where = topology(generation)
            rows = shape_of(name).most_rows(RESERVE * where.memory_gib * GIB, model, where.copies)
            if not rows:
                lines.append(f"| {name} | {generation}-64 | data={64 // model},model={model} | none fits | | | | |")
                continue
            with_cache, without, free = (
                requests_per_hour(name, generation, 64, model, rows, cached=cached, links=links)
                for cached, links in ((True, True), (False, True), (True, False))
            )
            line = f"{name} | {generation}-64 | data={64 // model},model={model} | {rows}"
            ratio = f"{with_cache / without:.2f}"
            lines.append(f"| {line} | {with_cache:,.0f} | {without:,.0f} | {ratio} | {free:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the study."""
    parser = argparse.ArgumentParser(description="Memory and roofline throughput of slices, from shapes.")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(study())


if __name__ == "__main__":
    main()
