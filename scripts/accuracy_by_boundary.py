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
from bicache_jax.core.config import SamplingConfig
from bicache_jax.example import task
from bicache_jax.measure.by_boundary import accuracy_by_boundary, verdict
from bicache_jax.measure.evaluate import items_of
from bicache_jax.measure.plots import DPI, accuracy_over_boundaries
from bicache_jax.serving.inputs import read_requests


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of every boundary on the same questions.

    Raises:
        BicacheError: the model or the task cannot be read.
    """
    from tqdm import tqdm

    model = load_model(args.model)
    if args.task == "example":
        lines: list[Any] = list(
            task.draw_requests(task.FIRST_HELD_OUT + args.seed, args.samples, people=(2, 12), facts=(1, 4))
        )
    else:
        lines = list(read_requests(args.task, flag="--task").lines)
    sampling = SamplingConfig(gen_length=args.gen_length)
    items = items_of(lines, model, sampling, f"--task {args.task}")[: args.samples]
    with tqdm(total=(model.config.num_layers + 2) * len(items), unit="answer") as bar:
        rows = accuracy_by_boundary(
            model,
            items,
            sampling=sampling,
            refresh_interval=args.refresh_interval,
            progress=lambda done: None if bar.update(done) else None,
        )
    given = {key: getattr(args, key) for key in ("model", "task", "seed", "refresh_interval")}
    return {**given, "samples": len(items), "rows": rows}


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
    print(verdict(record["rows"]))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    accuracy_over_boundaries(record["rows"]).savefig(args.output.with_suffix(".png"), dpi=DPI)


if __name__ == "__main__":
    main()
