"""Estimates memory and throughput of TPU slices from shapes: memory from the planner, time from the roofline.

python scripts/scaling_study.py --output scripts/results/scaling.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax.numpy as jnp

from bicache_jax.configs import model_shape, published_table, topology
from bicache_jax.core.boundary import boundary_at
from bicache_jax.core.config import ModelConfig
from bicache_jax.serving.flops import Job, batch_seconds, row_flops
from bicache_jax.serving.grouping import prefix_ratio
from bicache_jax.serving.memory import RESERVE, Footprint
from bicache_jax.sharding import Partition

GIB = 2**30
PREFIX, SUFFIX, RESPONSE, STEPS, BLOCK, PER_PREFIX = 1024, 512, 256, 256, 32, 16


def boundary_for(config: ModelConfig) -> int:
    """The published boundary at this study's prefix ratio."""
    table = published_table(config)
    assert table is not None
    return boundary_at(table.table, prefix_ratio(PREFIX, PREFIX + SUFFIX))


def footprint(config: ModelConfig, generation: str, model: int) -> Footprint:
    """Footprint of a device that holds a `model`-th part of the model."""
    copies = topology(generation).copies
    return Footprint.of(Partition(config, model), [boundary_for(config)], jnp.dtype(jnp.bfloat16), copies=copies)


def largest(config: ModelConfig, generation: str, model: int) -> int:
    """Largest number of rows per data shard that fits into the share `RESERVE` of the memory."""
    limit = RESERVE * topology(generation).hbm_gib * GIB
    found = footprint(config, generation, model)
    return found.most_rows(limit, prefix=PREFIX, suffix=SUFFIX, per_prefix=PER_PREFIX)


def job_of(config: ModelConfig, per_prefix: int) -> Job:
    """The run of a row."""
    return Job(
        prefix=PREFIX,
        suffix=SUFFIX,
        steps=STEPS,
        block=BLOCK,
        response=RESPONSE,
        boundary=boundary_for(config),
        refresh_interval=16,
        rows_per_prefix=per_prefix,
    )


def requests_per_hour(
    config: ModelConfig, generation: str, chips: int, model: int, rows: int, *, cached: bool, links: bool = True
) -> float:
    """Upper bound: each pass takes the larger of arithmetic and memory traffic, at peak rates, and then its sums."""
    chip = topology(generation)
    job = job_of(config, PER_PREFIX)
    seconds = batch_seconds(
        config,
        job if cached else job.without_prefix(),
        rows,
        peak=chip.tflops_bfloat16 * 1e12 * model,
        bandwidth=chip.hbm_gb_per_second * 1e9 * model,
        itemsize=2,
        published=False,
        sums=lambda nbytes: chip.all_reduce_seconds(nbytes, model) if links else 0.0,
    )
    return 3600 / seconds * rows * chips * chip.devices_per_chip / model


def study() -> str:
    """The study as Markdown."""
    lines = [
        "# Scaling, from shapes",
        "",
        f"bfloat16, P = {PREFIX}, U = {SUFFIX}, {RESPONSE} response tokens in {STEPS} steps, blocks of {BLOCK}, N = 16,"
        f" {PER_PREFIX} rows to a prefix, the published boundary. Made by `python scripts/scaling_study.py`. Memory is"
        " the planner's; requests an hour are the roofline's upper bound (per pass peak arithmetic or memory traffic,"
        " then the sums over the model axis at the documented speed of the links of one axis, since compiled programs"
        " overlap nothing with them): **an estimate, not a measurement**.",
        "",
        "## Memory (GiB) and work of a v5e device, LLaDA-8B",
        "",
        "| model axis | rows | prefixes | parameters | shared KV | KV by row | activations | total | TFLOP a batch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    config = model_shape("llada_8b")
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
        found = footprint(config, "v5e", model).memory(groups=groups, prefix=PREFIX, rows=rows, suffix=SUFFIX)
        parts = (found.params, found.prefixes, found.deep, found.activations, found.total)
        work = rows * row_flops(config, job_of(config, rows // groups)) / model
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
            config = model_shape(name)
            rows = largest(config, generation, model)
            if not rows:
                lines.append(f"| {name} | {generation}-64 | data={64 // model},model={model} | none fits | | | | |")
                continue
            with_cache, without, free = (
                requests_per_hour(config, generation, 64, model, rows, cached=cached, links=links)
                for cached, links in ((True, True), (False, True), (True, False))
            )
            shape = f"{name} | {generation}-64 | data={64 // model},model={model} | {rows}"
            ratio = f"{with_cache / without:.2f}"
            lines.append(f"| {shape} | {with_cache:,.0f} | {without:,.0f} | {ratio} | {free:,.0f} |")
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
