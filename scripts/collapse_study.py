"""Looks for tasks on which naive prefix caching fails: trains the example model on three, and measures each boundary.

    python scripts/collapse_study.py --output runs/collapse [--taught]

Questions of the example model survive any boundary, since answers read the document themselves. Here an instruction in
the suffix changes what words of the prefix mean: the prefix says where persons live and what they drink, the suffix
that each town is another one (`Oslo means Cairo .`), and then a question is asked.

* `renamed`: which town does Mara live in. An answer would have to read the document and then the instruction, unless
  words of the document read the instruction first.
* `reverse`: who lives in Cairo, by its new name. The question's own word can read the instruction.
* `other`: what does Mara drink, which no instruction changes.

Training goes on from the bundled model, with one word more. `--taught` also trains each town of the prefix on its new
name. That is not how such models are trained; it shows what a prefix costs that does depend on the suffix.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_llada import CONFIG, EOS, MASK, PAD, loss_of, make_optimizer, with_kept_buffers

from bicache_jax import example_task as task
from bicache_jax.config import CacheConfig, SamplingConfig
from bicache_jax.evaluation import Item, evaluate
from bicache_jax.functional import backbone_for
from bicache_jax.loading import load_model
from bicache_jax.similarity import layer_similarity
from bicache_jax.types import Model, Request

KINDS = ("renamed", "reverse", "other")
WORDS = (*task.VOCABULARY, "means")
TOKEN_ID = {word: index for index, word in enumerate(WORDS)}
SHAPE = dataclasses.replace(CONFIG, vocab_size=len(WORDS))
LENGTH, RESPONSE, QUESTIONS = 192, 4, 6


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A document, an instruction, and questions with their answers by kind; in words.

    Attributes:
        prefix: the document.
        instruction: what each town means.
        questions: kind, question, answer.
        renamed: place of each town in the prefix, and its new name.
    """

    prefix: tuple[str, ...]
    instruction: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, ...], str], ...]
    renamed: dict[int, str]


def draw_document(rng: np.random.Generator) -> Drawn:
    """Draws a document of 3 to 8 persons; no two live in one town."""
    people = int(rng.integers(3, 9))
    names = [task.NAMES[index] for index in rng.choice(len(task.NAMES), people, replace=False)]
    drinks = [task.DRINKS[index] for index in rng.choice(len(task.DRINKS), people, replace=False)]
    places = [task.PLACES[index] for index in rng.choice(len(task.PLACES), 2 * people, replace=False)]
    towns, new = places[:people], places[people:]
    prefix: list[str] = []
    renamed = {}
    questions: list[tuple[str, tuple[str, ...], str]] = []
    for name, town, meant, drink in zip(names, towns, new, drinks, strict=True):
        lives, drinks_it = task.statement(name, 0, town), task.statement(name, 1, drink)
        renamed[len(prefix) + lives.index(town)] = meant
        prefix += [*lives, *drinks_it]
        asked = task.RELATIONS[0], task.RELATIONS[1]
        questions.append(("renamed", (*asked[0].ask, name, *asked[0].ends), meant))
        questions.append(("reverse", ("who", *asked[0].verb, meant), name))
        questions.append(("other", (*asked[1].ask, name, *asked[1].ends), drink))
    instruction = [word for place in rng.permutation(people) for word in (towns[place], "means", new[place], ".")]
    shuffled = tuple(questions[index] for index in rng.permutation(len(questions)))
    return Drawn(tuple(prefix), tuple(instruction), shuffled, renamed)


def ids(words: tuple[str, ...]) -> list[int]:
    """Token ids of words."""
    return [TOKEN_ID[word] for word in words]


def draw_batch(seed: int, step: int, rows: int, taught: bool) -> tuple[np.ndarray, ...]:
    """A step's batch: inputs, targets, which targets count, which tokens are there."""
    rng = np.random.default_rng([seed, 0, step])
    inputs = np.full((rows, LENGTH), PAD, np.int32)
    targets, counts, valid = inputs.copy(), np.zeros((rows, LENGTH), bool), np.zeros((rows, LENGTH), bool)
    for row in range(rows):
        drawn = draw_document(rng)
        tokens = ids((*drawn.prefix, *drawn.instruction))
        for _, question, answer in drawn.questions[: int(rng.integers(1, QUESTIONS + 1))]:
            tokens += ids(question)
            ends = int(rng.integers(1, RESPONSE))
            counts[row, len(tokens) : len(tokens) + 1 + ends] = True
            tokens += [*ids((answer,)), *[EOS] * ends]
        targets[row, : len(tokens)] = tokens
        valid[row, : len(tokens)] = True
        inputs[row] = np.where(counts[row], MASK, targets[row])
        if taught:
            for place, word in drawn.renamed.items():
                targets[row, place], counts[row, place] = TOKEN_ID[word], True
    return inputs, targets, counts, valid


def start(seed: int) -> Any:
    """The bundled model's parameters, and rows for the new words that look like those of the others."""
    rng = np.random.default_rng(seed)
    params: Any = dict(load_model("example").params)
    for name in ("embed", "head"):
        rows = np.asarray(params[name], np.float32)
        new = rows.mean(0) + rows.std(0) * rng.normal(size=(len(WORDS) - len(rows), rows.shape[1]))
        params[name] = jnp.asarray(np.concatenate([rows, new]), jnp.float32)
    return params


def train(seed: int, steps: int, rate: float, rows: int, taught: bool, log: Path) -> Any:
    """Trains; returns parameters."""
    params = start(seed)
    optimizer = make_optimizer(rate, steps)
    state = optimizer.init(params)

    @jax.jit
    def update(params: Any, state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(partial(loss_of, SHAPE))(params, batch)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, loss

    losses: list[Any] = []
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool, log.open("w") as out:
        pending = pool.submit(draw_batch, seed, 0, rows, taught)
        for step in range(1, steps + 1):
            batch, pending = pending.result(), pool.submit(draw_batch, seed, step, rows, taught)
            params, state, loss = update(params, state, batch)
            losses.append(loss)
            if step % 250 == 0 or step == steps:
                model = Model(SHAPE, params)
                (quick,) = score(model, held_out(2, 60), CacheConfig(policy="none"))
                mean = round(float(np.mean(losses)), 4)
                record = {"step": step, "loss": mean, "exact_match": quick["exact_match"]}
                record |= {kind: group["exact_match"] for kind, group in quick["by_kind"].items()}
                print(json.dumps(record | {"seconds": round(time.perf_counter() - started)}), file=out, flush=True)
                losses = []
    return params


def held_out(seed: int, samples: int) -> list[Item]:
    """Questions of documents that training has not seen, one for each, all kinds alike."""
    rng = np.random.default_rng([task.FIRST_HELD_OUT + seed])
    sampling = SamplingConfig(gen_length=RESPONSE)
    items = []
    for number in range(samples):
        drawn = draw_document(rng)
        kind = KINDS[number % len(KINDS)]
        question, answer = next((words, answer) for asked, words, answer in drawn.questions if asked == kind)
        prompt = tuple(ids((*drawn.prefix, *drawn.instruction, *question)))
        request = Request(str(number), prompt, len(drawn.prefix), sampling, index=number)
        items.append(Item(request, (str(TOKEN_ID[answer]),), kind))
    return items


def score(model: Model, items: list[Item], cache: CacheConfig) -> list[dict[str, Any]]:
    """Accuracy of a policy."""
    return evaluate(
        model, items, [cache.policy], cache=cache, sampling=SamplingConfig(gen_length=RESPONSE), timed=0, batch_size=32
    )


def similarity(params: Any, items: list[Item]) -> dict[str, list[float]]:
    """Mean similarity of the prefix's KV alone and in the whole input, answers masked, by kind and layer."""
    sequences = np.full((len(items), LENGTH), PAD, np.int32)
    for row, item in enumerate(items):
        tokens = [*item.request.prompt_ids, *[MASK] * RESPONSE]
        sequences[row, : len(tokens)] = tokens
    lengths = [len(item.request.prompt_ids) + RESPONSE for item in items]
    prefixes = [item.request.prefix_len or 0 for item in items]
    found = layer_similarity(
        backbone_for(SHAPE),
        params,
        jnp.asarray(sequences),
        jnp.asarray(lengths),
        jnp.asarray(prefixes),
        prefix_bucket=max(prefixes),
    )
    kinds = np.asarray([item.kind for item in items])
    return {kind: np.asarray(found)[kinds == kind].mean(0).round(4).tolist() for kind in KINDS}


def draw(record: dict[str, Any], path: Path) -> None:
    """Draws similarity by layer, and accuracy by boundary: lines refreshed every 16 steps, dots at every step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    similar, accuracy = figure.subplots(1, 2)
    for place, kind in enumerate(KINDS):
        color = f"C{place}"
        similar.plot(range(1, SHAPE.num_layers + 1), record["similarity"][kind], marker="o", color=color, label=kind)
        for interval, style in ((16, "-"), (1, ":")):
            rows = [row for row in record["rows"] if row["refresh_interval"] == interval]
            values = [row["by_kind"][kind]["exact_match"] for row in rows]
            label = kind if interval == 16 else None
            accuracy.plot([row["boundary"] for row in rows], values, style, marker=".", color=color, label=label)
    similar.set(xlabel="layer", ylabel="similarity of prefix KV, alone and in context")
    accuracy.set(xlabel="boundary b (8: naive)", ylabel="exact match (dotted: N = 1)", ylim=(0, 1.03))
    accuracy.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains, measures, draws."""
    with_kept_buffers()
    parser = argparse.ArgumentParser(description="Looks for tasks on which naive prefix caching fails.")
    parser.add_argument("--output", type=Path, required=True, help="folder for log, figures and picture")
    parser.add_argument("--taught", action="store_true", help="also train the prefix on what to read from the suffix")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=12, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=600, help="questions measured (default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    params = train(args.seed, args.steps, args.rate, args.rows, args.taught, args.output / "log.jsonl")
    model, items = Model(SHAPE, params), held_out(1, args.samples)
    (reference,) = score(model, items, CacheConfig(policy="none"))
    record: dict[str, Any] = {"taught": args.taught, "steps": args.steps, "samples": args.samples}
    record |= {"none": {key: reference[key] for key in ("exact_match", "by_kind")}, "rows": []}
    record["similarity"] = similarity(params, items)
    for interval in (1, 4, 16):
        for boundary in range(SHAPE.num_layers + 1):
            (found,) = score(model, items, CacheConfig(policy="bicache", boundary=boundary, refresh_interval=interval))
            row = {"refresh_interval": interval, "boundary": boundary}
            record["rows"].append(row | {key: found[key] for key in ("exact_match", "by_kind")})
    (args.output / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, args.output / "study.png")


if __name__ == "__main__":
    main()
