"""Trains the example model: a small LLaDA that answers questions about a document.

    python scripts/train_example.py --output runs/example [--resume]

This command made the bundled checkpoint. Training begins from the start in `structured_start.py`; without it the model
would only guess some value of the document for thousands of steps. Every sequence is drawn from the seed. Lessons grow
from 3 people with one fact each to whole documents. Lists are learned in the second to last lesson, which has mostly
lists and many shared values. The last lesson restores the accuracy of the other kinds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from safetensors.numpy import load_file, save_file
from small_llada import CONFIG, EOS, MASK, drawn_ahead, export, logits_of, loss_of, make_optimizer, with_kept_buffers
from structured_start import structured_start

from bicache_jax.cli.options import integer
from bicache_jax.example import task


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A stage of the curriculum.

    Attributes:
        people: largest number of people in a document; the smallest is a third of it.
        facts: largest number of facts per person.
        questions: questions per sequence.
        batch: sequences per step.
        length: tokens per sequence, with padding.
        restated: share of the questions that restate a fact with one word missing.
        repeat: probability that a value is shared with another person.
        kinds: kinds of questions; a kind that is listed several times is asked more often.
        steps: largest number of steps; the next lesson begins earlier if every kind is above `PASS`.
    """

    people: int
    facts: int
    questions: int
    batch: int
    length: int
    restated: float
    repeat: float
    kinds: tuple[str, ...]
    steps: int


PASS = 0.92
STATE = "training.safetensors"  # in --output: parameters and optimizer state for --resume
_SIMPLE = ("forward", "reverse")
LESSONS = (
    Lesson(3, 1, 6, 48, 96, 0.4, 0.0, _SIMPLE, 400),
    Lesson(4, 2, 8, 32, 128, 0.4, 0.0, _SIMPLE, 400),
    Lesson(6, 3, 12, 20, 224, 0.2, 0.0, (*_SIMPLE, "about"), 500),
    Lesson(8, 3, 14, 14, 320, 0.0, 0.15, task.KINDS, 400),
    Lesson(12, 4, 16, 10, 432, 0.0, 0.15, task.KINDS, 500),
    Lesson(8, 3, 12, 10, 288, 0.0, 0.4, (*_SIMPLE, "about", "joined", *["list"] * 5), 800),
    Lesson(12, 4, 16, 10, 432, 0.0, 0.2, (*task.KINDS, "about", "list"), 100_000),
)


def draw_sequence(rng: np.random.Generator, lesson: Lesson) -> tuple[list[int], list[bool]]:
    """One sequence: a document, then questions with their answers and end-of-text tokens.

    Returns:
        Tokens, and which of them may be masked.
    """
    people = int(rng.integers(max(2, lesson.people // 3), lesson.people + 1))
    facts = int(rng.integers(1, lesson.facts + 1)) if lesson.facts > 1 else 1
    document = task.draw_document(rng, people, facts, lesson.repeat)
    known = [q for q in document.questions() if q.kind in lesson.kinds]
    by_kind = [[q for q in known if q.kind == kind] for kind in lesson.kinds]
    by_kind = [group for group in by_kind if group]
    tokens = task.ids(document.words)
    answers = [False] * len(tokens)
    count = int(rng.integers(1, lesson.questions + 1)) if rng.random() < 0.3 else lesson.questions
    for number in range(count):
        if rng.random() < lesson.restated:
            words = task.ids(task.statement(*document.facts[rng.integers(len(document.facts))]))
            missing = int(rng.choice([0, len(words) - 2]))
            tokens += words
            answers += [index == missing for index in range(len(words))]
            continue
        group = by_kind[rng.integers(len(by_kind))]
        question = group[rng.integers(len(group))]
        last = number == count - 1
        ends = int(rng.integers(1, 5)) if not last else int(rng.integers(1, 13))
        answer = [*task.ids(question.answer), *[EOS] * ends]
        tokens += [*task.ids(question.words), *answer]
        answers += [False] * len(question.words) + [True] * len(answer)
    return tokens, answers


def draw_batch(seed: int, step: int, lesson: Lesson) -> tuple[np.ndarray, ...]:
    """A step's batch: inputs, targets, which targets count, which tokens are not padding [B, 1, T]."""
    rng, length = np.random.default_rng([seed, 0, step]), lesson.length
    ids = np.full((lesson.batch, length), task.TOKEN_ID[task.PAD], np.int32)
    counts = np.zeros((lesson.batch, length), bool)
    valid = np.zeros((lesson.batch, length), bool)
    for row in range(lesson.batch):
        tokens, answers = draw_sequence(rng, lesson)
        while len(tokens) > length:
            tokens, answers = draw_sequence(rng, lesson)
        ids[row, : len(tokens)] = tokens
        valid[row, : len(tokens)] = True
        share = 1.0 if rng.random() < 0.5 else rng.uniform(0.15, 1.0)
        counts[row, : len(tokens)] = np.asarray(answers) & (rng.random(len(tokens)) < share)
    return np.where(counts, MASK, ids), ids, counts, valid[:, None]


def quick_accuracy(predict: Any, params: dict[str, Any], seed: int, lesson: Lesson) -> dict[str, float]:
    """Share of held-out questions with a right answer if all of it is predicted in one pass, by kind.

    Answers of several words are easier step by step, so this is a lower bound. It is cheap enough to control lessons.
    """
    rng, length = np.random.default_rng([seed, 2]), lesson.length
    right: dict[str, list[bool]] = {kind: [] for kind in lesson.kinds}
    rows: list[list[int]] = []
    spans: list[tuple[str, int, list[int]]] = []
    while len(rows) < 60:
        document = task.draw_document(rng, lesson.people, lesson.facts, lesson.repeat)
        asked = [q for q in task.pick_questions(rng, document, 10) if q.kind in lesson.kinds]
        for question in asked[:5]:
            prompt = task.ids((*document.words, *question.words))
            answer = [*task.ids(question.answer), EOS]
            if len(prompt) + len(answer) > length:
                continue
            rows.append(prompt + [MASK] * len(answer))
            spans.append((question.kind, len(prompt), answer))
    for begin in range(0, len(rows), 20):
        part = rows[begin : begin + 20]
        ids = np.zeros((20, length), np.int32)
        valid = np.zeros((20, length), bool)
        for index, row in enumerate(part):
            ids[index, : len(row)], valid[index, : len(row)] = row, True
        found = np.asarray(predict(params, ids, valid[:, None]))
        for index, (kind, at, answer) in enumerate(spans[begin : begin + 20]):
            right[kind].append(list(found[index, at : at + len(answer)]) == answer)
    return {kind: round(float(np.mean(values)), 3) for kind, values in right.items() if values}


def save_checkpoint(folder: Path, tree: Any, state: dict[str, Any]) -> None:
    """Writes parameters and optimizer state atomically."""
    leaves = {f"{index:04d}": np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(tree))}
    save_file(leaves, folder / "next.safetensors", metadata={"state": json.dumps(state)})
    os.replace(folder / "next.safetensors", folder / STATE)


def load_checkpoint(folder: Path, tree: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_checkpoint` wrote, into the structure of `tree`."""
    from safetensors import safe_open

    file = folder / STATE
    leaves = load_file(file)
    with safe_open(file, framework="numpy") as handle:
        state = json.loads(handle.metadata()["state"])
    return jax.tree.unflatten(jax.tree.structure(tree), [jnp.asarray(leaves[name]) for name in sorted(leaves)]), state


def keep_log(log: Path, step: int) -> None:
    """Drops log lines after `step`, since those steps will run again."""
    lines = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
    log.write_text("".join(lines))


def draw_curve(log: Path, picture: Path) -> None:
    """Draws loss and accuracy by step from a training log."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    loss, accuracy = figure.subplots(2, sharex=True)
    steps = [record["step"] for record in records]
    loss.plot(steps, [record["loss"] for record in records], color="black")
    loss.set(ylabel="loss", yscale="log")
    for kind in task.KINDS:
        known = [record for record in records if kind in record["one_pass_accuracy"]]
        values = [record["one_pass_accuracy"][kind] for record in known]
        accuracy.plot([record["step"] for record in known], values, label=kind)
    for axes in (loss, accuracy):
        for before, after in zip(records, records[1:], strict=False):
            if before["lesson"] != after["lesson"]:
                axes.axvline(before["step"], color="0.8", linewidth=1)
    accuracy.set(xlabel="step (grey lines: next lesson)", ylabel="exact match, one pass", ylim=(0, 1.02))
    figure.legend(loc="outside upper center", ncols=len(task.KINDS), fontsize="small")
    figure.savefig(picture, dpi=100)


def main() -> None:
    """Runs the training."""
    parser = argparse.ArgumentParser(description="Trains the example model.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the log, the state and the checkpoint")
    parser.add_argument(
        "--seed", type=integer(0, task.CALIBRATION - 1), default=1, help="of all data; others are held out (default: 1)"
    )
    parser.add_argument("--steps", type=integer(1), default=3400, help="steps in all (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the last saved state in --output")
    parser.add_argument(
        "--save-every", type=integer(1), default=200, help="steps between saved states (default: %(default)s)"
    )
    args = parser.parse_args()
    saved = (args.output / STATE).exists()
    if saved != args.resume:
        parser.error(
            f"--output {args.output}: "
            + ("holds a training: continue it with --resume" if saved else f"has no {STATE} for --resume")
        )
    with_kept_buffers()
    args.output.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(args.rate, args.steps)
    start = structured_start(CONFIG, args.seed)
    tree: Any = (start, optimizer.init(start))
    state: dict[str, Any] = {"step": 0, "lesson": 0, "lesson_step": 0, "seconds": 0.0}
    if args.resume:
        tree, state = load_checkpoint(args.output, tree)
        keep_log(args.output / "log.jsonl", state["step"])
    log = (args.output / "log.jsonl").open("a" if args.resume else "w")

    @jax.jit
    def update(tree: Any, batch: tuple[Array, ...]) -> tuple[Any, Array]:
        params, opt_state = tree
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        changes, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), loss

    @jax.jit
    def predict(params: Any, ids: Array, visible: Array) -> Array:
        return jnp.argmax(logits_of(params, ids, visible).at[..., MASK].set(-jnp.inf), axis=-1)

    started = time.perf_counter() - state["seconds"]
    while state["step"] < args.steps:
        lesson = LESSONS[state["lesson"]]
        losses = []
        for batch in drawn_ahead(partial(draw_batch, args.seed, lesson=lesson), state["step"]):
            tree, loss = update(tree, batch)
            losses.append(loss)
            state["step"] += 1
            state["lesson_step"] += 1
            over = False
            if state["step"] % 50 == 0:
                quick = quick_accuracy(predict, tree[0], task.CALIBRATION - 1, lesson)
                record = {
                    "step": state["step"],
                    "lesson": state["lesson"],
                    "loss": round(float(np.mean(losses)), 4),
                    "one_pass_accuracy": quick,
                    "seconds": round(time.perf_counter() - started, 1),
                }
                losses = []
                print(json.dumps(record), file=log, flush=True)
                over = min(quick.values()) >= PASS or state["lesson_step"] >= lesson.steps
            state["seconds"] = time.perf_counter() - started
            over = over and state["lesson"] + 1 < len(LESSONS)
            if over:  # before the state is saved, so that a resumed run also continues with the next lesson
                state |= {"lesson": state["lesson"] + 1, "lesson_step": 0}
            if state["step"] % args.save_every == 0 or state["step"] == args.steps:
                save_checkpoint(args.output, tree, state)
                export(tree[0], args.output / "model")
            if over or state["step"] == args.steps:
                break
    log.close()
    draw_curve(args.output / "log.jsonl", args.output / "curve.png")


if __name__ == "__main__":
    main()
