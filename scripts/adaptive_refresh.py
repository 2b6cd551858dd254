"""Asks whether deep prefix KV should be refreshed when they have drifted, instead of every N steps; a simulation.

    python scripts/adaptive_refresh.py --output scripts/results/adaptive_refresh

Every step computes what a refresh would give, and a rule decides what of it each row takes: all of it when a signal
passes a threshold, or that of the prefix tokens that have changed most. So work is counted, not saved. Signals:

* `suffix`: change of the suffix's hidden states before layer b since the row's last refresh. A reuse step has them
  anyway.
* `first`: change of the prefix's keys and values in the first layer that has read the suffix. That costs one of the
  deep layers in every step, which is counted.
* `all`: change in all deep layers. It costs a refresh in every step, and is here to show what the best of signals could
  give; its cost is not counted.

Answers are compared with those without a cache. What a rule must beat is a fixed N with as much work.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax import CacheConfig, Engine, Model, Request, SamplingConfig, encode_prefix, load_model
from bicache_jax.cli.options import integer
from bicache_jax.core.backbone import Backbone
from bicache_jax.core.cache import Decoding, DeepCache, PrefixCache, Rows, SuffixCache
from bicache_jax.core.layout import lay_out_canvases
from bicache_jax.core.table import Table
from bicache_jax.decoding.forward import SuffixForward
from bicache_jax.decoding.interval import NO_LIMIT, denoise_steps, initial_state
from bicache_jax.decoding.schedule import make_decoding
from bicache_jax.example import task as example_task
from bicache_jax.measure.evaluate import items_of
from bicache_jax.wiring import backbone_for

SIGNALS = ("fixed", "suffix", "first", "all")
ROWS = 100
TRIPS = Path(__file__).parents[1] / "examples" / "trips"


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a row refreshes, and how much.

    Attributes:
        signal: what decides: `fixed`, or a change.
        value: N, or the change from which a row refreshes.
        share: of the prefix's tokens, those that have changed most, that a refresh renews.
    """

    signal: str
    value: float
    share: float = 1.0

    @property
    def name(self) -> str:
        """What tables call it."""
        named = f"N = {self.value:g}" if self.signal == "fixed" else f"{self.signal} > {self.value:g}"
        return named if self.share == 1 else f"{named}, {100 * self.share:g} % of the tokens"


RULES = (
    *(Rule("fixed", n) for n in (1, 2, 4, 8, 16)),
    *(Rule("suffix", change) for change in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)),
    *(Rule("first", change) for change in (0.01, 0.02, 0.05, 0.1, 0.2)),
    *(Rule("all", change) for change in (0.01, 0.02, 0.05, 0.1, 0.2)),
    *(Rule("fixed", n, share) for n in (1, 2, 4) for share in (0.1, 0.25, 0.5)),
)


def _change(new: jax.Array, old: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Relative change, by norms over some axes."""
    norm = jnp.sqrt(jnp.sum(old**2, axes))
    return jnp.sqrt(jnp.sum((new - old) ** 2, axes)) / jnp.maximum(norm, 1e-9)


@functools.partial(jax.jit, static_argnames=("backbone", "shallow", "boundary", "steps", "width"))
def simulate(
    backbone: Backbone,
    shallow: Backbone,
    params: Any,
    cache: PrefixCache,
    rows: Rows,
    decoding: Decoding,
    signal: jax.Array,
    value: jax.Array,
    share: jax.Array,
    *,
    boundary: int,
    steps: int,
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """Denoises rows under a rule.

    Args:
        backbone: the model (static).
        shallow: its layers below the boundary (static).
        params: its parameters.
        cache: the prefixes, one for each row.
        rows: the rows at step 0.
        decoding: what they share, with a refresh interval without end.
        signal: index into `SIGNALS`.
        value: the rule's value.
        share: the rule's share.
        boundary: b, at least 1 (static).
        steps: denoising steps (static).
        width: response tokens (static).

    Returns:
        Suffix tokens [B, U], and refreshes made by each row, as shares of the prefix's tokens.
    """
    config, (num_rows, length) = backbone.config, rows.tokens.shape
    start = initial_state(
        config,
        rows,
        dtype=cache.hidden.dtype,
        prefix_len=cache.k.shape[-2],
        deep_layers=config.num_layers - 1,
        block_cache=False,
    )
    below = {**params, "layers": jax.tree.map(lambda leaf: leaf[:boundary], params["layers"])}
    none = SuffixCache(*[jnp.zeros((0, num_rows, config.num_kv_heads, length, config.head_dim))] * 2)
    everything, always = jnp.ones((num_rows, length), bool), jnp.ones((num_rows,), bool)
    zero = jnp.zeros((num_rows,), jnp.int32)
    counted = jnp.arange(cache.k.shape[-2]) < cache.length[:, None]

    def over(pieces: Backbone, parameters: Any, b: int, rows: Rows) -> SuffixForward:
        return SuffixForward(pieces, parameters, cache, rows, jnp.asarray(b), zero, everything, always, rows.valid)

    def step(count: jax.Array, carry: Any) -> Any:
        state, seen, work = carry
        empty = DeepCache(*[jnp.zeros((0, *start.deep.k.shape[1:]))] * 2)
        x = over(shallow, below, boundary - 1, state.rows).reuse(empty, none)[0]
        x = jnp.where(state.rows.valid[..., None], x, 0)
        fresh = over(backbone, params, boundary, state.rows).refresh(state.deep, none)[1]
        kv = [jnp.where(counted[:, None, :, None], leaf, 0) for leaf in (*jax.tree.leaves(fresh),)]
        held = [jnp.where(counted[:, None, :, None], leaf, 0) for leaf in (*jax.tree.leaves(state.deep),)]
        new, old = jnp.stack(kv), jnp.stack(held)  # [2, L - 1, B, K, P, H]
        fixed = jnp.broadcast_to(count % jnp.maximum(value, 1).astype(jnp.int32) == 0, (num_rows,))
        passed = [
            _change(x, seen, (1, 2)) > value,
            _change(new[:, 0], old[:, 0], (0, 2, 3, 4)) > value,
            _change(new, old, (0, 1, 3, 4, 5)) > value,
        ]
        due = (jnp.stack([fixed, *passed])[signal] | (count == 0)) & ~state.rows.done
        # Of the tokens those that have changed most in the first layer.
        moved = jnp.where(counted, _change(new[:, 0], old[:, 0], (0, 2, 4)), -1.0)
        rank = jnp.argsort(jnp.argsort(-moved, axis=1), axis=1)
        part = jnp.where(count == 0, 1.0, share)
        taken = due[:, None] & (rank < jnp.ceil(part * cache.length)[:, None])
        deep = jax.tree.map(lambda a, b: jnp.where(taken[:, None, :, None], a, b), fresh, state.deep)
        seen = jnp.where(due[:, None, None], x, seen)
        work = work + jnp.sum(taken & counted, 1) / cache.length
        rows = dataclasses.replace(state.rows, interval_step=zero + 1)
        state = denoise_steps(
            backbone,
            params,
            cache,
            dataclasses.replace(state, rows=rows, deep=deep),
            decoding,
            jnp.asarray(1),
            jnp.asarray(NO_LIMIT),
            jnp.asarray(NO_LIMIT),
            block_width=width,
            sizes=(length,),
        )
        return state, seen, work

    seen = jnp.zeros((num_rows, length, config.d_model))
    state, _, work = jax.lax.fori_loop(0, steps, step, (start, seen, jnp.zeros((num_rows,))))
    return state.rows.tokens, work


def _batch(model: Model, requests: list[Request], sampling: SamplingConfig) -> tuple[Any, Rows]:
    """Prefixes and rows of requests, padded to the longest."""
    lengths = np.asarray([request.prefix_len for request in requests])
    prefixes = np.zeros((len(requests), lengths.max()), np.int32)
    sizes = np.asarray([len(r.prompt_ids) - p + sampling.gen_length for r, p in zip(requests, lengths, strict=True)])
    canvas = np.full((len(requests), sizes.max()), model.config.mask_id, np.int32)
    for row, (request, prefix) in enumerate(zip(requests, lengths, strict=True)):
        prefixes[row, :prefix] = request.prompt_ids[:prefix]
        canvas[row, : sizes[row] - sampling.gen_length] = request.prompt_ids[prefix:]
    rows = lay_out_canvases(
        model.config, jnp.asarray(lengths), jnp.asarray(canvas), jnp.asarray(sizes), sampling, jax.random.key(0)
    )
    cache = encode_prefix(model.params, model.config, jnp.asarray(prefixes), prefix_len=jnp.asarray(lengths))
    return cache, dataclasses.replace(rows, prefix_index=jnp.arange(len(requests)))


def study(name: str, model: Model, lines: list[Any], boundary: int, gen_length: int) -> dict[str, Any]:
    """All rules on a model.

    Args:
        name: what the model is called.
        model: the model; its logits are not shifted.
        lines: requests with answers and prefixes.
        boundary: b, at least 1.
        gen_length: response tokens, one a step.
    """
    sampling = SamplingConfig(gen_length=gen_length)
    items = items_of(lines, model, sampling, name)
    requests = [item.request for item in items]
    plain = Engine(model, cache=CacheConfig(policy="none"), sampling=sampling).generate(requests)
    backbone = backbone_for(model.config)
    shallow = backbone_for(dataclasses.replace(model.config, num_layers=boundary))
    decoding = make_decoding(model.config, sampling, boundary, NO_LIMIT)
    deep_layers = model.config.num_layers - 1 - boundary
    batches = [_batch(model, requests[begin : begin + ROWS], sampling) for begin in range(0, len(requests), ROWS)]
    ends = [next((i for i, t in enumerate(r.token_ids) if t in model.config.eos_ids), gen_length) for r in plain]
    rows: list[dict[str, Any]] = []
    answers = []
    for rule in RULES:
        tokens, work = [], []
        for cache, laid in batches:
            found, made = simulate(
                backbone,
                shallow,
                model.params,
                cache,
                laid,
                decoding,
                jnp.asarray(SIGNALS.index(rule.signal)),
                jnp.asarray(rule.value, jnp.float32),
                jnp.asarray(rule.share, jnp.float32),
                boundary=boundary,
                steps=sampling.num_steps,
                width=gen_length,
            )
            tokens += np.asarray(found)[:, :gen_length].tolist()
            work += np.asarray(made).tolist()
        looks = (gen_length - 1) / deep_layers if rule.signal == "first" or rule.share < 1 else 0.0
        same = [
            tuple(own[: end + 1]) == result.token_ids[: end + 1]
            for own, result, end in zip(tokens, plain, ends, strict=True)
        ]
        equal = [np.mean(np.equal(own, result.token_ids)) for own, result in zip(tokens, plain, strict=True)]
        rows.append(
            {
                "rule": rule.name,
                **dataclasses.asdict(rule),
                "refreshes": round(float(np.mean(work)), 3),
                "work": round(float(np.mean(work)) + looks, 3),
                "same_answer": round(float(np.mean(same)), 4),
                "equal_tokens": round(float(np.mean(equal)), 4),
            }
        )
        answers.append(np.asarray(same, float))
    for row, gain in zip(rows, gains(rows, np.stack(answers)), strict=True):
        row["gain"] = gain
    return {
        "model": name,
        "boundary": boundary,
        "layers": model.config.num_layers,
        "requests": len(items),
        "rows": rows,
    }


def gains(rows: list[dict[str, Any]], answers: np.ndarray) -> list[list[float] | None]:
    """What each realisable rule gains over a fixed N with as much work, request by request.

    Args:
        rows: of a study; between two fixed intervals a request's agreement is taken to change evenly with work.
        answers: whether each rule gave each request the same answer as none [rules, requests].

    Returns:
        The mean difference in same answers with a 95 % interval, corrected for the number of rules (Bonferroni; normal
        approximation); None for fixed intervals and for what could not be had.
    """
    fixed = sorted(
        (i for i, r in enumerate(rows) if r["signal"] == "fixed" and r["share"] == 1),
        key=lambda i: float(rows[i]["work"]),
    )
    work = [rows[i]["work"] for i in fixed]
    mine = [i for i, r in enumerate(rows) if i not in fixed and r["signal"] != "all"]
    quantile = statistics.NormalDist().inv_cdf(1 - 0.025 / max(1, len(mine)))
    found: list[list[float] | None] = [None] * len(rows)
    for i in mine:
        place = float(np.interp(rows[i]["work"], work, np.arange(len(fixed))))
        low, high = answers[fixed[int(place)]], answers[fixed[math.ceil(place)]]
        difference = answers[i] - (low + (place - int(place)) * (high - low))
        mean, error = difference.mean(), quantile * difference.std() / np.sqrt(len(difference))
        found[i] = [round(float(value), 4) for value in (mean, mean - error, mean + error)]
    return found


def winners(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rules that give more of the same answers than a fixed N with as much work, beyond chance."""
    return [row for row in rows if row["gain"] is not None and row["gain"][1] > 0]


HEADS = (
    "rule",
    "refreshes",
    "with looking",
    "same answer as none",
    "equal tokens",
    "points over a fixed N of as much work (95 %)",
)


def page(record: dict[str, Any]) -> str:
    """The study in Markdown."""
    said = []
    for part in record["studies"]:
        rows = [
            (
                row["rule"],
                f"{row['refreshes']:.2f}",
                f"{row['work']:.2f}" if row["signal"] != "all" else None,
                f"{100 * row['same_answer']:.1f} %",
                f"{100 * row['equal_tokens']:.1f} %",
                row["gain"] and "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in row["gain"])),
            )
            for row in part["rows"]
        ]
        said.append(
            f"## {part['model']}: {part['requests']} requests, {part['layers']} layers, b = {part['boundary']}\n\n"
            + Table(HEADS, rows).markdown()
        )
    return "\n\n".join(said) + "\n"


def main() -> None:
    """Simulates, writes JSON and a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=integer(1), default=300, help="requests of each model (default: 300)")
    parser.add_argument("--seed", type=integer(0), default=7, help="of the bundled model's questions")
    parser.add_argument("--output", type=Path, required=True, help="path without extension; writes .json and .md")
    args = parser.parse_args()
    drawn = list(example_task.draw_requests(example_task.FIRST_HELD_OUT + args.seed, args.samples))
    trips = [json.loads(line) for line in (TRIPS / "questions.jsonl").read_text().splitlines()[: args.samples]]
    studies = [
        study("example", load_model("example"), drawn, 2, 16),
        study("trips", load_model(str(TRIPS / "bidirectional" / "model")), trips, 1, 8),
    ]
    record = {"samples": args.samples, "seed": args.seed, "studies": studies}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(page(record))
    print(page(record), end="")
    for part in studies:
        won = ", ".join(row["rule"] for row in winners(part["rows"])) or "none"
        print(f"{part['model']}: rules that beat a fixed N at equal work: {won}")


if __name__ == "__main__":
    main()
