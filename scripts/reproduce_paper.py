"""Runs the comparison of the BiCache paper on a model and tasks at hand, and sets it beside what its abstract says.

    python scripts/reproduce_paper.py --model GSAI-ML/LLaDA-8B-Instruct \
        --tasks gsm8k.jsonl@numeric math500.jsonl@numeric gpqa.jsonl@choice arc_challenge.jsonl@choice \
        --output runs/reproduction

Each task is a file of requests with answers (`bicache evaluate --help`), or `example`, the bundled model's; behind `@`
its scorer. The paper's tasks, settings and policies are the defaults, as its authors' evaluation script has them
(github.com/OSSS-KU/BiCache, `run_eval.sh`): GSM8K, MATH-500, GPQA and ARC-Challenge without examples of the harness,
behind a system prompt for each task, which is the shared prefix; 256 tokens in 128 steps and blocks of 32, N = 16, one
request at a time. Writes OUTPUT.json, and OUTPUT.md from it.

Published figures are those of the abstract (arXiv 2606.07571). Its tables are not repeated here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bicache_jax import BicacheError, CacheConfig, Model, SamplingConfig, load_model
from bicache_jax.cli.options import auto_or_integer, boundary, integer, listed
from bicache_jax.core.boundary import load_table
from bicache_jax.display import evaluation
from bicache_jax.example import task as example_task
from bicache_jax.measure.evaluate import Item, evaluate, items_of
from bicache_jax.measure.profile import THRESHOLD, draw_samples, make_table, measure, shallow_layers
from bicache_jax.measure.scorers import find_scorer
from bicache_jax.serving.inputs import read_requests

POLICIES = ("none", "naive", "bicache", "none+dual", "naive+dual", "bicache+dual")
SIMILAR = 16
"""Requests of a task on which similarity is measured."""
SPLITS = 4
"""Prompts that are split at each ratio."""

Results = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the abstract says, in other words, and how what was measured here is set beside it.

    Attributes:
        published: the claim.
        ours: what it is for one task's results (policies by name) and its similarity; a sentence, and whether it is as
            published (None: it was not measured).
    """

    published: str
    ours: Callable[[Results, dict[str, Any]], tuple[str, bool | None]]


def _points(result: dict[str, Any]) -> str:
    low, high = result["difference_interval"]
    return f"{100 * result['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def _collapse(found: Results, similar: dict[str, Any]) -> tuple[str, bool | None]:
    if not {"none", "naive"} <= set(found):
        return "`none` or `naive` was not run", None
    none, naive = found["none"], found["naive"]
    said = f"`naive` answers {100 * naive['exact_match']:.1f} % rightly, `none` {100 * none['exact_match']:.1f} %"
    if naive["difference"] < 0 and naive["mcnemar_p"] < 0.05:
        near_zero = naive["exact_match"] <= 0.05
        return f"{said}: {'near zero' if near_zero else 'much is lost, but it is not near zero'}", near_zero
    return f"{said}: no loss beyond chance", False


def _stable(found: Results, similar: dict[str, Any]) -> tuple[str, bool | None]:
    layers = similar["layers"]
    leading = shallow_layers(layers, THRESHOLD)
    said = (
        f"similarity of a prefix's keys and values alone and in the whole is {layers[0]:.3f} in the first layer and"
        f" {layers[-1]:.3f} in the last, above {THRESHOLD} in the first {leading} of {len(layers)}"
    )
    return said, leading > 0


def _by_ratio(found: Results, similar: dict[str, Any]) -> tuple[str, bool | None]:
    depths = similar["depths"]
    listed = ", ".join(f"{depth} at {ratio} %" for ratio, depth in depths.items())
    return f"leading layers above {THRESHOLD} by the prefix's share: {listed}", len(set(depths.values())) > 1


def _throughput(found: Results, similar: dict[str, Any]) -> tuple[str, bool | None]:
    said, as_published = [], []
    for own, other in (("bicache", "none"), ("bicache+dual", "none+dual")):
        if own not in found or other not in found:
            continue
        mine, theirs = found[own], found[other]
        allowed = f"counted operations allow {100 * (mine['limit'] / theirs['limit'] - 1):+.0f} %"
        if mine["tokens_per_s"] is None:
            said.append(f"`{own}` over `{other}`: not timed; {allowed}")
            continue
        gain = mine["tokens_per_s"] / theirs["tokens_per_s"] - 1
        said.append(f"`{own}` over `{other}`: {100 * gain:+.0f} % tokens/s; {allowed}")
        as_published.append(gain >= 0.363)
    return "; ".join(said), all(as_published) if as_published else None


def _accuracy(found: Results, similar: dict[str, Any]) -> tuple[str, bool | None]:
    own = [name for name in ("bicache", "bicache+dual") if name in found]
    if not own or "none" not in found:
        return "`none` or `bicache` was not run", None
    said = "; ".join(f"`{name}`: {_points(found[name])}" for name in own)
    return f"against `none`, {said}", all(found[name]["difference"] >= -0.018 for name in own)


CLAIMS = (
    Claim("Prefix caching as for language models that read one way makes accuracy collapse to near zero.", _collapse),
    Claim("Keys and values of a shared prefix stay alike, and reusable, in shallow layers.", _stable),
    Claim("How deep these layers go depends on the prefix's share of the request.", _by_ratio),
    Claim("BiCache raises throughput by 36.3 to 98.3 % over existing techniques.", _throughput),
    Claim("Accuracy does not collapse: it differs by 0 to 1.8 %.", _accuracy),
)
VERDICTS = {True: "yes", False: "no", None: "not measured"}


def similarity(model: Model, items: Sequence[Item], seed: int) -> dict[str, Any]:
    """Similarity of a task's prefixes by layer, and how many layers are shallow where its prompts are split.

    Args:
        model: the model.
        items: the task.
        seed: of the splits.
    """
    requests = [item.request for item in items]
    own = draw_samples(model, requests, split=False, ratio_step=100, per_ratio=SIMILAR)
    split = draw_samples(model, requests, split=True, ratio_step=25, per_ratio=SPLITS, seed=seed)
    measured = [(split[place].ratio, [float(v) for v in layers]) for place, layers in measure(model, split)]
    layers = np.mean([layers for _, layers in measure(model, own)], axis=0)
    return {
        "layers": [round(float(value), 4) for value in layers],
        "depths": {str(ratio): depth for ratio, depth in make_table(model, measured).table.items()},
    }


def run_task(model: Model, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A task under all policies.

    Args:
        model: the model.
        name: `FILE` or `example`, with its scorer behind `@`.
        args: the flags.

    Raises:
        BicacheError: the task or its scorer cannot be read.
    """
    source, _, scorer = name.partition("@")
    if source == "example":
        lines: list[Any] = list(example_task.draw_requests(example_task.FIRST_HELD_OUT + args.seed, args.samples))
    else:
        lines = list(read_requests(source, flag="--tasks").lines)
    sampling = SamplingConfig(gen_length=args.gen_length, steps=args.steps, block_length=args.block_length)
    items = items_of(lines, model, sampling, f"--tasks {source}")[: args.samples]
    table = None if args.boundary_table is None else load_table(args.boundary_table).table
    found = evaluate(
        model,
        items,
        args.policies,
        cache=CacheConfig(boundary=args.boundary, table=table, refresh_interval=args.refresh_interval),
        sampling=sampling,
        scorer=find_scorer(scorer or "exact"),
        batch_size=args.batch_size,
        timed=args.timed,
    )
    return {
        "task": Path(source).stem,
        "samples": len(items),
        "results": found,
        "similarity": similarity(model, items, args.seed),
    }


def page(record: dict[str, Any]) -> str:
    """The comparison in Markdown.

    Args:
        record: what is in OUTPUT.json.
    """
    given = record["settings"]
    said = [
        f"Model `{record['model']}`, {record['layers']} layers, on {record['device']}; {given['gen_length']} tokens in"
        f" {given['steps']} steps, blocks of {given['block_length']}, N = {given['refresh_interval']},"
        f" {given['batch_size'] or 'as many as planned'} rows a batch.",
    ]
    for part in record["tasks"]:
        found = {result["policy"]: result for result in part["results"]}
        said += [
            f"## {part['task']}: {part['samples']} questions",
            "| the abstract, in other words | here | as published |",
        ]
        said[-1] += "\n|---|---|---|"
        for claim in CLAIMS:
            ours, as_published = claim.ours(found, part["similarity"])
            said[-1] += f"\n| {claim.published} | {ours} | {VERDICTS[as_published]} |"
        said.append(evaluation(part["results"]).markdown())
    return "\n\n".join(said) + "\n"


def main() -> None:
    """Runs the comparison, writes JSON and a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="GSAI-ML/LLaDA-8B-Instruct", help="(default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="FILE[@SCORER]")
    parser.add_argument("--policies", type=listed, default=POLICIES, metavar="LIST", help="(default: the paper's)")
    parser.add_argument("--samples", type=integer(1), default=100_000, help="most questions of a task (default: all)")
    parser.add_argument("--gen-length", type=integer(1), default=256, metavar="N")
    parser.add_argument("--steps", type=integer(1), default=128, metavar="N")
    parser.add_argument("--block-length", type=integer(1), default=32, metavar="N")
    parser.add_argument("--refresh-interval", type=auto_or_integer(1), default=16, metavar="auto|N")
    parser.add_argument("--boundary", type=boundary, default="auto", metavar="auto|INT")
    parser.add_argument("--boundary-table", metavar="FILE", help="table for 'auto' (default: the model's own)")
    parser.add_argument("--batch-size", type=integer(1), default=1, metavar="N", help="rows (default: 1, as published)")
    parser.add_argument("--timed", type=integer(0), default=100, metavar="N", help="questions that are timed; 0: none")
    parser.add_argument("--seed", type=integer(0), default=7, help="of questions that are drawn")
    parser.add_argument("--dtype", default="auto", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="path without extension")
    args = parser.parse_args()
    try:
        model = load_model(args.model, dtype=args.dtype)
        parts = [run_task(model, name, args) for name in args.tasks]
    except (BicacheError, ValueError) as error:
        parser.error(str(error))
    names = ("gen_length", "steps", "block_length", "refresh_interval", "boundary", "batch_size", "timed", "seed")
    record = {
        "model": args.model,
        "layers": model.config.num_layers,
        "device": jax.devices()[0].device_kind,
        "settings": {name: getattr(args, name) for name in names} | {"boundary_table": args.boundary_table},
        "tasks": parts,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(page(record))
    print(page(record), end="")


if __name__ == "__main__":
    main()
