"""Answers a file of requests with several policies, in turns in one process, and compares their speed.

python scripts/compare_policies.py examples/five_shot.jsonl --output scripts/results/five_shot.md
python scripts/compare_policies.py examples/samples.jsonl --temperature 1 --output scripts/results/samples.md

Unlike `bicache evaluate` it runs all samples of a request.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bicache_jax import BicacheError, CacheConfig, Engine, Request, SamplingConfig, load_model
from bicache_jax.measure.evaluate import measure_speed
from bicache_jax.measure.policies import comparable_blocks, parse_policy
from bicache_jax.measure.scorers import exact_match
from bicache_jax.serving.answers import accepted
from bicache_jax.serving.inputs import is_blank
from bicache_jax.serving.requests import Parser

HEADS = ("policy", "right", "tokens/s", "against the first", "limit", "forward passes", "prefixes encoded", "boundary")


def main() -> None:
    """Runs the comparison and prints its table."""
    parser = argparse.ArgumentParser(description="Compares the speed of policies on a file of requests.")
    parser.add_argument("requests", type=Path, help="requests, JSON lines, each with an answer")
    parser.add_argument("--model", default="example", help="folder, hub id, or 'example' (default: %(default)s)")
    parser.add_argument("--policies", default="none,bicache", help="the first is the reference (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="measured turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the table (default: only print it)")
    args = parser.parse_args()
    try:
        table = compare(args)
    except BicacheError as error:
        raise SystemExit(f"compare_policies.py: {error}") from None
    print(table, end="")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(table, encoding="utf-8")


def compare(args: argparse.Namespace) -> str:
    """The comparison as a Markdown table."""
    model = load_model(args.model)
    caches = [parse_policy(name, CacheConfig()) for name in args.policies.split(",")]
    sampling = comparable_blocks(caches, SamplingConfig(temperature=args.temperature))
    lines = [line for line in args.requests.read_bytes().split(b"\n") if not is_blank(line)]
    requests = Parser(model.config, model.tokenizer, sampling).requests(lines, str(args.requests))
    answers = {
        request.id: accepted(json.loads(line).get("answer")) for request, line in zip(requests, lines, strict=True)
    }
    engines = [Engine(model, cache=cache, sampling=sampling) for cache in caches]
    rows = [_answer(engine, requests, answers) for engine in engines]
    made = sum(request.n * request.sampling.gen_length for request in requests)
    times = measure_speed(engines, requests, turns=args.turns, seconds=300)
    against = times[:, :1] / times
    out = [
        f"`{args.requests.name}`: {len(requests)} requests, {sum(request.n for request in requests)} responses,"
        f" {made} tokens; model `{args.model}`, temperature {args.temperature:g}.",
        f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores), {len(times)} turns: medians,"
        " in brackets the range.",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|" + "---|" * len(HEADS),
    ]
    for index, (name, row) in enumerate(zip(args.policies.split(","), rows, strict=True)):
        speed, ratio = made / np.median(times[:, index]), against[:, index]
        cells = [
            name,
            row["right"],
            f"{speed:.0f}",
            f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})",
            f"{engines[index].plan(requests).gain:.2f}",
            *(str(row[field]) for field in ("forward_passes", "prefixes", "boundaries")),
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def _answer(engine: Engine, requests: list[Request], answers: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    results = engine.generate(requests)
    scored = [exact_match(result.text or "", answers[result.id]) for result in results if answers[result.id]]
    boundaries = sorted({result.boundary for result in results if result.prefix_len})
    return {
        "right": f"{sum(scored)} of {len(scored)}",
        "forward_passes": engine.stats.forward_passes,
        "prefixes": engine.stats.prefixes_encoded,
        "boundaries": " to ".join(map(str, dict.fromkeys([boundaries[0], boundaries[-1]]))) if boundaries else "-",
    }


if __name__ == "__main__":
    main()
