"""Looks for tasks on which naive prefix caching fails: trains the example model on three, and measures each boundary.

    python scripts/collapse_study.py --output runs/collapse [--taught]

Questions of the example model survive any boundary, since answers read the document themselves. These are made so that
it would pay if tokens of the prefix read the suffix first:

* `form`: the prefix holds forms with blanks, the suffix the values and which form to write out; the answer is the
  filled form, word by word.
* `but`: who lives in A or drinks B but not both. Whoever does both matches best, and is wrong.
* `count`: how many do.

Training goes on from the bundled model, whose vocabulary gets a few words more, and every sequence has one question, as
a request has. `--taught` also trains tokens of the prefix on what they are to work
out from the suffix: a blank on its value, the end of each person's facts on whether that person is one of those asked
for. That is not how such models are trained; it shows what a prefix costs that does depend on the suffix.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
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

NUMBERS = ("zero", "one", "two", "three", "four", "five")
FIELDS = {"person": task.NAMES, "town": task.PLACES, "drink": task.DRINKS}
BLANKS = {field: f"[{field}]" for field in FIELDS}
WORDS = tuple(
    dict.fromkeys(
        (*task.VOCABULARY, *FIELDS, *BLANKS.values(), *NUMBERS, *"letter write how many or but not both yes no".split())
    )
)
TOKEN_ID = {word: index for index, word in enumerate(WORDS)}
SHAPE = dataclasses.replace(CONFIG, vocab_size=len(WORDS))
LENGTH, RESPONSE = 72, 8


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A question: its prefix, its suffix and its answer, in words, and what `--taught` teaches tokens of the prefix."""

    kind: str
    prefix: tuple[str, ...]
    suffix: tuple[str, ...]
    answer: tuple[str, ...]
    taught: dict[int, str]


def _some(rng: np.random.Generator, words: tuple[str, ...] | list[str], count: int) -> list[str]:
    return [words[index] for index in rng.choice(len(words), count, replace=False)]


def draw_form(rng: np.random.Generator) -> Drawn:
    """Forms with blanks; which one to write out with which values."""
    count = int(rng.integers(2, 5))
    fixed = iter(_some(rng, task.GAMES + task.PETS, 20))
    values = {field: _some(rng, words, 1)[0] for field, words in FIELDS.items()}
    titles = _some(rng, task.NAMES, count)
    forms = []
    for _ in titles:
        form = [next(fixed) for _ in range(int(rng.integers(2, 5)))]
        for field in _some(rng, tuple(FIELDS), int(rng.integers(1, 4))):
            form.insert(int(rng.integers(len(form) + 1)), BLANKS[field])
        forms.append(form)
    prefix = [word for title, form in zip(titles, forms, strict=True) for word in ("letter", title, *form, ".")]
    filled = {BLANKS[field]: value for field, value in values.items()}
    given = [word for field in _some(rng, tuple(FIELDS), 3) for word in (field, values[field])]
    asked = int(rng.integers(count))
    return Drawn(
        "form",
        tuple(prefix),
        (*given, "write", titles[asked]),
        tuple(filled.get(word, word) for word in forms[asked]),
        {place: filled[word] for place, word in enumerate(prefix) if word in filled},
    )


def draw_people(rng: np.random.Generator, kind: str) -> Drawn:
    """Persons who live somewhere and drink something; who does one of two things but not both, or how many do."""
    people = int(rng.integers(4, 7))
    names, towns, drinks = (_some(rng, words, people) for words in (task.NAMES, task.PLACES, task.DRINKS))
    both = int(rng.integers(1, 3))
    single = 1 if kind == "but" else int(rng.integers(0, people - both + 1))
    facts = []
    for place, name in enumerate(names):
        first = bool(rng.random() < 0.5)
        lives = place < both or (place < both + single and first)
        drinks_it = place < both or (place < both + single and not first)
        # Values of the others are several persons', too.
        town = towns[0] if lives else towns[1 + int(rng.integers(2))]
        drink = drinks[0] if drinks_it else drinks[1 + int(rng.integers(2))]
        facts.append((name, town, drink, lives != drinks_it))
    facts = [facts[index] for index in rng.permutation(people)]
    prefix: list[str] = []
    taught = {}
    for name, town, drink, chosen in facts:
        prefix += [name, "lives", "in", town, name, "drinks", drink, "."]
        taught[len(prefix) - 1] = "yes" if chosen else "no"
    question = ("lives", "in", towns[0], "or", "drinks", drinks[0], "but", "not", "both")
    found = [name for name, *_, chosen in facts if chosen]
    if kind == "but":
        return Drawn(kind, tuple(prefix), ("who", *question), tuple(found), taught)
    return Drawn(kind, tuple(prefix), ("how", "many", *question), (NUMBERS[len(found)],), taught)


KINDS: dict[str, Callable[[np.random.Generator], Drawn]] = {
    "form": draw_form,
    "but": partial(draw_people, kind="but"),
    "count": partial(draw_people, kind="count"),
}


def ids(words: tuple[str, ...]) -> list[int]:
    """Token ids of words."""
    return [TOKEN_ID[word] for word in words]


def draw_batch(seed: int, step: int, rows: int, taught: bool) -> tuple[np.ndarray, ...]:
    """A step's batch: inputs, targets, which targets count, which tokens are there."""
    rng = np.random.default_rng([seed, 0, step])
    inputs = np.full((rows, LENGTH), PAD, np.int32)
    targets, counts, valid = inputs.copy(), np.zeros((rows, LENGTH), bool), np.zeros((rows, LENGTH), bool)
    for row in range(rows):
        drawn = KINDS[list(KINDS)[row % len(KINDS)]](rng)
        prompt = ids((*drawn.prefix, *drawn.suffix))
        response = [*ids(drawn.answer), *[EOS] * RESPONSE][:RESPONSE]
        tokens = prompt + response
        share = 1.0 if rng.random() < 0.5 else rng.uniform(0.15, 1.0)
        counts[row, len(prompt) : len(tokens)] = rng.random(RESPONSE) < share
        targets[row, : len(tokens)] = tokens
        valid[row, : len(tokens)] = True
        inputs[row] = np.where(counts[row], MASK, targets[row])
        if taught:
            for place, word in drawn.taught.items():
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
    """Questions of documents that training has not seen, all kinds alike."""
    rng = np.random.default_rng([task.FIRST_HELD_OUT + seed])
    sampling = SamplingConfig(gen_length=RESPONSE)
    items = []
    for number in range(samples):
        drawn = KINDS[list(KINDS)[number % len(KINDS)]](rng)
        prompt = tuple(ids((*drawn.prefix, *drawn.suffix)))
        request = Request(str(number), prompt, len(drawn.prefix), sampling, index=number)
        items.append(Item(request, (" ".join(map(str, ids(drawn.answer))),), drawn.kind))
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
    parser.add_argument("--rows", type=int, default=30, help="sequences of a step (default: %(default)s)")
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
