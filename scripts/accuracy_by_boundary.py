"""Measures and draws accuracy against the boundary, from b = 0 to L, at several prefix ratios.

python scripts/accuracy_by_boundary.py --samples 300 --output scripts/results/accuracy_by_boundary
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bicache_jax import BicacheError, load_model
from bicache_jax.cli.options import integer
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.example import task
from bicache_jax.measure.evaluate import evaluate, items_of
from bicache_jax.serving.inputs import read_requests


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of every boundary on the same questions.

    Raises:
        BicacheError: the model or the task cannot be read.
    """
    model = load_model(args.model)
    if args.task == "example":
        lines: list[Any] = list(
            task.draw_requests(task.FIRST_HELD_OUT + args.seed, args.samples, people=(2, 12), facts=(1, 4))
        )
    else:
        lines = list(read_requests(args.task, flag="--task").lines)
    sampling = SamplingConfig(gen_length=args.gen_length)
    items = items_of(lines, model, sampling, f"--task {args.task}")[: args.samples]
    rows = []
    for boundary in range(model.config.num_layers + 1):
        cache = CacheConfig(boundary=boundary, refresh_interval=args.refresh_interval)
        (result,) = evaluate(model, items, ["bicache"], cache=cache, sampling=sampling, timed=0)
        rows.append({"boundary": boundary, **{key: result[key] for key in ("exact_match", "by_kind", "by_ratio")}})
        print(json.dumps(rows[-1]), flush=True)
    given = {key: getattr(args, key) for key in ("model", "task", "seed", "refresh_interval")}
    return {**given, "samples": len(items), "rows": rows}


BANDS = ((0, 49), (50, 69), (70, 79), (80, 89), (90, 100))


def bands(by_ratio: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Merges ranges of ten percent into a few ranges with enough questions each."""
    joined = {}
    for low, high in BANDS:
        members = [group for label, group in by_ratio.items() if low <= int(label.split("-")[0]) <= high]
        samples = sum(group["samples"] for group in members)
        if samples:
            right = sum(group["exact_match"] * group["samples"] for group in members)
            joined[f"{low}-{high}"] = {"exact_match": right / samples, "samples": samples}
    return joined


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws a measurement: one line per ratio range on the left, one per kind of question on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = zip(figure.subplots(1, 2, sharey=True), ("by_ratio", "by_kind"), ("r, %", "kind"), strict=True)
    rows = [row | {"by_ratio": bands(row["by_ratio"])} for row in record["rows"]]
    for axes, field, title in panels:
        for label in rows[0][field]:
            values = [row[field][label]["exact_match"] for row in rows]
            count = rows[0][field][label]["samples"]
            axes.plot([row["boundary"] for row in rows], values, marker="o", label=f"{label} ({count})")
        axes.plot([row["boundary"] for row in rows], [row["exact_match"] for row in rows], color="black", label="all")
        axes.set(xlabel="boundary b (L: naive prefix cache)", ylim=(0, 1.03))
        axes.legend(title=title, fontsize="x-small", title_fontsize="x-small", ncols=2, loc="lower left")
    figure.axes[0].set_ylabel("exact match")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, writes JSON, draws."""
    parser = argparse.ArgumentParser(description="Accuracy of a model by boundary.")
    parser.add_argument("--model", default="example")
    parser.add_argument("--task", default="example", help="file of requests with answers; default: generated questions")
    parser.add_argument("--samples", type=integer(1), default=300)
    parser.add_argument("--seed", type=integer(0), default=7)
    parser.add_argument("--refresh-interval", type=integer(1), default=16)
    parser.add_argument("--gen-length", type=integer(1), default=16)
    parser.add_argument("--output", type=Path, required=True, help="path without extension; writes .json and .png")
    args = parser.parse_args()
    try:
        record = measure(args)
    except BicacheError as error:
        parser.error(str(error))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
