"""What weights and products in 8 bits cost in accuracy, and where in the model.

python scripts/quantize_study.py --output scripts/results/quantized

Two measurements, on CPUs in float32; parts that are already in the output are not measured again.

- Answers: the bundled model and that of `examples/trips` answer their questions in every format, paired.
- Logits: how far they are from those of the floats, in one pass over whole sequences, when only the first k layers are
  in 8 bits (k = 0 to L), and when embedding and head are, too. A model that is cut after k layers would have logits
  that it was never trained to have; with the rest of it in floats, what is measured is what an error made in these
  layers does to the answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax import BicacheError, Engine, Model, load_model
from bicache_jax.core.backbone import layer_params
from bicache_jax.core.config import CacheConfig, Quantize, SamplingConfig
from bicache_jax.core.quantized import product
from bicache_jax.example import task
from bicache_jax.measure.evaluate import Item, evaluate, items_of
from bicache_jax.serving.inputs import read_requests
from bicache_jax.wiring import backbone_for

HERE = Path(__file__).parents[1]
TRIPS = "examples/trips/bidirectional/model"
QUESTIONS = "examples/trips/questions.jsonl"
GOLDENS = ("llada-mha", "dream-gqa", "a2d-qwen3", "llada-moe", "sdar", "llada2")
FORMATS: tuple[Quantize, ...] = ("w8", "w8a8")
SAMPLES, TRIPS_SAMPLES, SEED, SEQUENCES = 500, 600, 7, 64
MOST_LOST = 0.01
"""What `w8a8` may cost in exact match before projections have to stay in floats."""


def questions(name: str, model: Model, gen_length: int) -> list[Item]:
    """The questions of a task."""
    sampling = SamplingConfig(gen_length=gen_length)
    if name == "example":
        return items_of(list(task.draw_requests(task.FIRST_HELD_OUT + SEED, SAMPLES)), model, sampling, name)
    return items_of(read_requests(str(HERE / QUESTIONS)).lines, model, sampling, name)[:TRIPS_SAMPLES]


TASKS: dict[str, dict[str, Any]] = {
    "example": {"model": "example", "gen_length": 16, "boundary": "auto"},
    "trips": {"model": TRIPS, "gen_length": 8, "boundary": 1},
}


def _model(name: str, quantize: Quantize | None = None) -> Model:
    return load_model(name if name == "example" else HERE / name, dtype="float32", quantize=quantize)


def answers(name: str) -> list[dict[str, Any]]:
    """Exact match and agreement of all formats on a task, without a cache and with BiCache."""
    facts = TASKS[name]
    model = _model(facts["model"])
    formats: dict[str, Model] = {quantize: _model(facts["model"], quantize) for quantize in FORMATS}
    names = ("none", "bicache")
    policies = [*names, *(f"{policy}@{quantize}" for quantize in FORMATS for policy in names)]
    results = evaluate(
        model,
        questions(name, model, facts["gen_length"]),
        policies,
        cache=CacheConfig(boundary=facts["boundary"]),
        sampling=SamplingConfig(gen_length=facts["gen_length"]),
        timed=0,
        formats=formats,
    )
    kept = ("policy", "samples", "exact_match", "agreement", "difference", "difference_interval", "mcnemar_p")
    return [{key: result[key] for key in kept} for result in results]


def canvases(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of a bundled model as it reads them: prompts with answers, all or half of whose tokens are masked.

    Returns:
        Tokens [B, S], whether they are there, and whether they are masks of the answer.
    """
    facts = TASKS[name]
    model, length = _model(facts["model"]), facts["gen_length"]
    asked = [item.request for item in questions(name, model, length)[:SEQUENCES]]
    engine = Engine(model, cache=CacheConfig(policy="none"), sampling=SamplingConfig(gen_length=length))
    found = {result.id: result.token_ids for result in engine.generate(asked)}
    rng, made = np.random.default_rng(SEED), []
    for request in asked:
        for share in (1.0, 0.5):
            hidden = rng.permutation(length) < share * length
            answer = np.where(hidden, model.config.mask_id, found[request.id])
            made.append((np.concatenate([request.prompt_ids, answer]), hidden))
    shape = (len(made), max(len(tokens) for tokens, _ in made))
    ids, there, masks = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (tokens, hidden) in enumerate(made):
        ids[row, : len(tokens)], there[row, : len(tokens)] = tokens, True
        masks[row, len(tokens) - length : len(tokens)] = hidden
    return ids, there, masks


def logits(plain: Model, small: Model, ids: np.ndarray, there: np.ndarray, *, layers: int, ends: bool) -> jax.Array:
    """Logits of a pass whose first layers are those of the 8-bit model, the others those of the floats.

    Args:
        plain: the model in floats.
        small: in 8 bits.
        ids: tokens [B, S].
        there: False for padding.
        layers: how many layers are in 8 bits.
        ends: whether embedding and head are.
    """
    both = [(backbone_for(model.config, "xla"), model.params) for model in (plain, small)]
    config = plain.config
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    block_ids = (positions // config.block_length,) * 2 if config.block_causal else None
    nothing = jnp.zeros((len(ids), config.num_kv_heads, 0, config.head_dim), jnp.float32)

    def layer(small: bool, index: int, x: jax.Array) -> jax.Array:
        backbone, params = both[small]
        own = layer_params(params, index)
        k, v = backbone.key_value(own, x, positions)
        q = backbone.query(own, x, positions)
        zeros, valid = jnp.zeros((len(ids),), jnp.int32), jnp.asarray(there)
        attended = backbone.attention(
            q, nothing, nothing, k, v, prefix_len=zeros, suffix_valid=valid, block_ids=block_ids
        )
        return backbone.finish(own, x, attended)

    run = jax.jit(layer, static_argnums=0)
    first, params = both[ends]
    x = first.embed(params, jnp.asarray(ids), positions)
    for index in range(config.num_layers):
        x = run(index < layers, index, x)
    x = first.final_norm(params, x)
    head, bias, scale = first.head(params)
    found = product(x, head, scale, out_first=True, quantize=first.config.quantize, dtype=jnp.float32)
    return found if bias is None else found + bias


def divergence(wanted: jax.Array, found: jax.Array, places: np.ndarray) -> dict[str, float]:
    """How far logits are from others at some places: KL divergence in nats, and how often they agree on the token."""
    p, q = (jax.nn.log_softmax(x, axis=-1) for x in (wanted, found))
    kl = np.asarray(jnp.sum(jnp.exp(p) * (p - q), axis=-1))[places]
    same = np.asarray(jnp.argmax(wanted, -1) == jnp.argmax(found, -1))[places]
    return {"mean": float(kl.mean()), "largest": float(kl.max()), "same_token": float(same.mean())}


def by_layers(plain: Model, small: Model, ids: np.ndarray, there: np.ndarray, places: np.ndarray) -> Iterator[Any]:
    """`divergence` with the first k layers in 8 bits for every k, and at last with embedding and head, too."""
    count = plain.config.num_layers
    wanted = logits(plain, small, ids, there, layers=0, ends=False)
    for layers, ends in [*((k, False) for k in range(1, count + 1)), (count, True)]:
        found = logits(plain, small, ids, there, layers=layers, ends=ends)
        yield {"layers": layers, "embedding_and_head": ends, **divergence(wanted, found, places)}


def of_logits(name: str, quantize: Quantize) -> list[Any]:
    """`by_layers` of a bundled model, or of a small random checkpoint of the tests."""
    if name in TASKS:
        plain, small = (_model(TASKS[name]["model"], one) for one in (None, quantize))
        ids, there, places = canvases(name)
    else:
        folder = HERE / "tests" / "data" / name
        facts = json.loads((folder / "cases.json").read_text())
        plain, small = (load_model(folder, mask_id=facts["mask_token_id"], quantize=one) for one in (None, quantize))
        with np.load(folder / "expected.npz") as recorded:
            ids = recorded["forward_ids"]
        there = places = np.ones(ids.shape, bool)
    return list(by_layers(plain, small, ids, there, places))


def _answers_table(answers: dict[str, Any]) -> list[str]:
    lines = [
        "## Answers",
        "",
        f"{SAMPLES} questions for the bundled model (seed {SEED}), {TRIPS_SAMPLES} of `examples/trips` (b = 1)."
        " Agreement and difference: with `none` in floats, paired, 95 % bootstrap interval.",
        "",
        "| task | policy | format | exact match | agreement | difference | McNemar p |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in answers.items():
        for result in results:
            policy, _, quantize = result["policy"].partition("@")
            low, high = result["difference_interval"]
            lines.append(
                f"| {name} | {policy} | {quantize or 'float32'} | {100 * result['exact_match']:.1f} % |"
                f" {100 * result['agreement']:.1f} % | {100 * result['difference']:+.1f} ({100 * low:+.1f} to"
                f" {100 * high:+.1f}) | {result['mcnemar_p']:.2g} |"
            )
    return [*lines, "", verdict(answers), ""]


def markdown(record: dict[str, Any]) -> str:
    """The study as Markdown."""
    lines = [
        "# 8 bits: what they cost",
        "",
        "Made by `python scripts/quantize_study.py --output scripts/results/quantized`, on CPUs in float32.",
        "",
        *(_answers_table(record["answers"]) if record["answers"] else ()),
        "## Logits",
        "",
        "KL divergence from the floats' distribution, in nats, and share of places where the most probable token is the"
        " same, when the first k layers are in 8 bits and the rest is not; the last line of each also has embedding and"
        f" head in 8 bits. Bundled models: {SEQUENCES} prompts with all or half of the answer masked, at its masks."
        " Others: the random checkpoints of `tests/data`, all places of their recorded passes.",
        "",
        "| model | format | k | mean KL | largest KL | same token |",
        "|---|---|---|---|---|---|",
    ]
    for name, formats in record["logits"].items():
        for quantize, rows in formats.items():
            for row in rows:
                layers = f"{row['layers']} + embedding, head" if row["embedding_and_head"] else str(row["layers"])
                lines.append(
                    f"| {name} | {quantize} | {layers} | {row['mean']:.2e} | {row['largest']:.2e} |"
                    f" {100 * row['same_token']:.1f} % |"
                )
    return "\n".join(lines) + "\n"


def verdict(results: dict[str, Any]) -> str:
    """Whether projections have to stay in floats."""
    if "example" not in results:
        return ""
    right = {result["policy"]: result["exact_match"] for result in results["example"]}
    lost = max(right[policy] - right[f"{policy}@w8a8"] for policy in ("none", "bicache"))
    if lost <= MOST_LOST:
        return (
            f"On the bundled model `w8a8` costs at most {100 * max(0.0, lost):.1f} points of exact match, so no"
            " projection has to stay in floats and there is no mixed format."
        )
    return f"On the bundled model `w8a8` costs {100 * lost:.1f} points of exact match: more than {100 * MOST_LOST:.0f}."


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing, and writes after every part."""
    parser = argparse.ArgumentParser(description="Accuracy of models in 8 bits.")
    parser.add_argument("--output", type=Path, required=True, help="path without extension; writes .json and .md")
    parser.add_argument("--only", nargs="+", choices=(*TASKS, *GOLDENS), help="some models (default: all)")
    parser.add_argument("--logits", action="store_true", help="no answers, which take longest")
    args = parser.parse_args(argv)
    file: Path = args.output.with_suffix(".json")
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"answers": {}, "logits": {}}

    def keep() -> None:
        file.write_text(json.dumps(record, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(markdown(record))

    try:
        for name in args.only or (*TASKS, *GOLDENS):
            for quantize in FORMATS:
                if quantize not in record["logits"].setdefault(name, {}):
                    record["logits"][name][quantize] = of_logits(name, quantize)
                    keep()
        for name in TASKS:
            if name not in record["answers"] and not args.logits and (args.only is None or name in args.only):
                record["answers"][name] = answers(name)
                keep()
    except BicacheError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
