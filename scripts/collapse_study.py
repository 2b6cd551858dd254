"""Shows a task on which naive prefix caching fails: trains a small model on it, and measures every boundary.

    python scripts/collapse_study.py --output runs/trips

The task (`trips.py`) asks about a document and a rule that follows it. The model is trained twice, from the same start
and on the same sequences: like LLaDA, with every token seeing every other, and as naive caching requires, with
documents that see only themselves. The first shows how much accuracy a cache costs a model with documents that read the
rule. The second shows whether the model can learn the task without that in the same number of steps. `examples/trips`
contains the output, without the second model's weights, and `policies.json` from `bicache evaluate --json` (see the
README).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from small_llada import CONFIG, EOS, MASK, PAD, drawn_ahead, export, loss_of, make_optimizer, with_kept_buffers
from trips import KINDS, TOKEN_ID, Question, draw_document, draw_requests, draw_rule, trips_start

from bicache_jax.cli.options import integer
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.types import Model
from bicache_jax.example import task
from bicache_jax.loading import load_model
from bicache_jax.measure.evaluate import Item, evaluate, items_of
from bicache_jax.measure.profile import THRESHOLD, Sample, measure, shallow_layers

SHAPE = dataclasses.replace(CONFIG, vocab_size=len(TOKEN_ID), num_layers=6)
RESPONSE, LENGTH, ROWS, QUESTIONS = 8, 176, 16, 6
SAMPLING = SamplingConfig(gen_length=RESPONSE)
HELD_OUT = task.FIRST_HELD_OUT + 1
EASY = 150
"""Number of first steps, which use documents of four trips; later steps use two to eight."""


def ids(words: tuple[str, ...]) -> list[int]:
    """Token ids of words."""
    return [TOKEN_ID[word] for word in words]


def draw_sequence(rng: np.random.Generator, people: int, towns: int) -> tuple[list[int], list[bool], int]:
    """One sequence: a document, a rule, questions with answers and ends of text.

    Returns:
        Tokens, which of them are answers, and the document's length.
    """
    document = draw_document(rng, people, towns)
    region, rule = draw_rule(rng, document)
    by_kind: dict[str, list[Question]] = {}
    for question in document.questions(region):
        by_kind.setdefault(question.kind, []).append(question)
    tokens = ids((*document.words, *rule))
    answers = [False] * len(tokens)
    for number in range(QUESTIONS):
        known = (
            by_kind[rng.choice(["towns", *["regions", "within"] * 2])] if "regions" in by_kind else by_kind["within"]
        )
        question = known[rng.integers(len(known))]
        ends = int(rng.integers(1, 3)) if number < QUESTIONS - 1 else int(rng.integers(1, RESPONSE + 1))
        answer = [TOKEN_ID[question.answer], *[EOS] * ends]
        tokens += [*ids(question.words), *answer]
        answers += [False] * len(question.words) + [True] * len(answer)
    return tokens[:LENGTH], answers[:LENGTH], len(document.words)


def draw_batch(seed: int, step: int, alone: bool) -> tuple[np.ndarray, ...]:
    """A step's batch: inputs, targets, which targets count, and what each token sees [B, T, T].

    Args:
        seed: seed of the data.
        step: training step.
        alone: whether documents see only themselves.
    """
    rng = np.random.default_rng([seed, 0, step])
    targets = np.full((ROWS, LENGTH), PAD, np.int32)
    counts = np.zeros((ROWS, LENGTH), bool)
    visible = np.zeros((ROWS, LENGTH, LENGTH), bool)
    for row in range(ROWS):
        people, towns = (4, 6) if step < EASY else (int(rng.integers(2, 9)), 10)
        tokens, answers, prefix = draw_sequence(rng, people, towns)
        share = 1.0 if rng.random() < 0.5 else rng.uniform(0.15, 1.0)
        targets[row, : len(tokens)] = tokens
        counts[row, : len(tokens)] = np.asarray(answers) & (rng.random(len(tokens)) < share)
        visible[row, :, : len(tokens)] = True
        if alone:
            visible[row, :prefix, prefix:] = False
    return np.where(counts, MASK, targets), targets, counts, visible


def train(seed: int, steps: int, rate: float, alone: bool, folder: Path) -> Model:
    """Trains, logs, and exports; returns the exported model."""
    params: Any = trips_start(SHAPE, seed)
    optimizer = make_optimizer(rate, steps)
    state = optimizer.init(params)

    @jax.jit
    def update(params: Any, state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(loss_of)(params, batch, SHAPE)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, loss

    cache = CacheConfig(policy="naive" if alone else "none")
    losses: list[Any] = []
    started = time.perf_counter()
    batches = drawn_ahead(partial(draw_batch, seed, alone=alone), 0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            params, state, loss = update(params, state, next(batches))
            losses.append(loss)
            if step % 100 == 0 or step == steps:
                export(params, folder / "model", SHAPE, TOKEN_ID, np.float16)
                model = load_model(str(folder / "model"))
                quick = score(model, items_from(model, task.CALIBRATION, 96), cache)
                record = {"step": step, "loss": round(float(np.mean(losses)), 4), "exact_match": quick}
                print(json.dumps(record | {"seconds": round(time.perf_counter() - started)}), file=log, flush=True)
                losses = []
    batches.close()
    return model


def items_from(model: Model, seed: int, samples: int) -> list[Item]:
    """Questions that are not used in training."""
    return items_of(list(draw_requests(seed, samples)), model, SAMPLING, "trips")


def score(model: Model, items: list[Item], cache: CacheConfig) -> dict[str, float]:
    """Accuracy of a policy: overall, and by kind of question."""
    (found,) = evaluate(model, items, [cache.policy], cache=cache, sampling=SAMPLING, timed=0, batch_size=32)
    return {"all": found["exact_match"]} | {kind: group["exact_match"] for kind, group in found["by_kind"].items()}


def similarity(model: Model, items: list[Item]) -> list[float]:
    """Mean similarity of the document's KV alone and in the whole prompt, by layer, as in `bicache profile`."""
    requests = [item.request for item in items]
    parts = [Sample(request.prompt_ids, request.prefix_len or 0, 50) for request in requests]
    mean = np.mean([layers for _, layers in measure(model, parts)], axis=0)
    return [round(float(value), 4) for value in mean]


def calibrate(model: Model) -> dict[str, Any]:
    """Boundaries chosen on calibration questions, which are not reported: by similarity, as published, and by answers.

    The second is the largest boundary that, at N = 16, loses at most one right answer in 96 compared with no cache.
    """
    items = items_from(model, task.CALIBRATION, 96)
    similar = similarity(model, items)
    none = score(model, items, CacheConfig(policy="none"))["all"]
    right = [
        score(model, items, CacheConfig(policy="bicache", boundary=boundary))["all"]
        for boundary in range(SHAPE.num_layers + 1)
    ]
    return {
        "similarity": similar,
        "boundary_by_similarity": shallow_layers(similar, THRESHOLD),
        "calibration": {"none": none, "by_boundary": right},
        "boundary_by_answers": max(boundary for boundary, value in enumerate(right) if value >= none - 1.01 / 96),
    }


def study(model: Model, samples: int) -> dict[str, Any]:
    """Accuracy without a cache and at every boundary and interval, and similarity by layer."""
    items = items_from(model, HELD_OUT, samples)
    record: dict[str, Any] = calibrate(model) | {"none": score(model, items, CacheConfig(policy="none"))}
    record["rows"] = []
    for interval in (1, 4, 16):
        for boundary in range(SHAPE.num_layers + 1):
            cache = CacheConfig(policy="bicache", boundary=boundary, refresh_interval=interval)
            row = {"refresh_interval": interval, "boundary": boundary}
            record["rows"].append(row | {"exact_match": score(model, items, cache)})
    return record


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws accuracy by boundary for both models, and similarity by layer for the first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.5), layout="constrained")
    seen, alone, similar = figure.subplots(1, 3)
    titles = {"bidirectional": "trained as LLaDA is", "prefix_alone": "trained with documents that see only themselves"}
    for axes, (name, title) in zip((seen, alone), titles.items(), strict=True):
        rows = [row for row in record[name]["rows"] if row["refresh_interval"] == 16]
        for kind in KINDS:
            values = [row["exact_match"][kind] for row in rows]
            axes.plot([row["boundary"] for row in rows], values, marker="o", label=kind)
        axes.set(title=title, xlabel=f"boundary b ({SHAPE.num_layers}: naive)", ylim=(0, 1.03))
        axes.title.set_fontsize("small")
    seen.set_ylabel("exact match, N = 16")
    seen.legend(fontsize="small", loc="center right")
    values = record["bidirectional"]["similarity"]
    similar.plot(range(len(values)), values, marker="o", color="black")
    similar.axhline(THRESHOLD, color="0.7", linestyle="--")
    similar.set(xlabel="layer (from 0)", ylabel="similarity of the document's KV", ylim=(0.8, 1.01))
    similar.set(title="trained as LLaDA is (axis from 0.8)")
    similar.title.set_fontsize("small")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Trains, measures, draws."""
    with_kept_buffers()
    parser = argparse.ArgumentParser(description="Shows a task on which naive prefix caching fails.")
    parser.add_argument("--output", type=Path, required=True, help="folder for models, logs, results and plot")
    parser.add_argument(
        "--seed", type=integer(0, task.CALIBRATION - 1), default=1, help="of all data; others are held out (default: 1)"
    )
    parser.add_argument("--steps", type=integer(1), default=1200, help="training steps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--samples", type=integer(1), default=600, help="questions measured (default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "questions.jsonl").open("w") as file:
        for question in draw_requests(HELD_OUT, args.samples):
            print(json.dumps(question), file=file)
    record: dict[str, Any] = {key: getattr(args, key) for key in ("seed", "steps", "rate", "samples")}
    for name in ("bidirectional", "prefix_alone"):
        model = train(args.seed, args.steps, args.rate, name == "prefix_alone", args.output / name)
        record[name] = study(model, args.samples)
        (args.output / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, args.output / "study.png")


if __name__ == "__main__":
    main()
