"""Accuracy of several policies on the same requests, and whether their difference means anything."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.types import BicacheError, Model, Request, Result
from bicache_jax.measure.policies import comparable_blocks, parse_policy, reference_of, weights_of
from bicache_jax.measure.scorers import Scorer, exact_match
from bicache_jax.serving.answers import accepted
from bicache_jax.serving.engine import Engine
from bicache_jax.serving.inputs import is_blank
from bicache_jax.serving.requests import Parser

TURNS = 3
"""Turns in which speed is measured, behind one that is not counted."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        request: what is asked.
        answers: answers that count as right.
        kind: kind of question, for the breakdown.
    """

    request: Request
    answers: tuple[str, ...]
    kind: str = ""


def items_of(
    lines: Sequence[Any], model: Model, sampling: SamplingConfig, source: str, *, unanswered: bool = False
) -> list[Item]:
    """Questions from the lines of a request file whose requests have an `answer`, and perhaps a `kind`.

    Args:
        lines: JSON, or records; blank lines are left out.
        model: who is asked.
        sampling: what requests do not set themselves.
        source: what messages call the file.
        unanswered: take requests without an answer, too.

    Raises:
        BicacheError: a request is bad or has no answer, or there are none.
    """
    records = []
    for line in lines:
        if is_blank(line):
            continue
        try:
            records.append(line if isinstance(line, dict) else json.loads(line))
        except (ValueError, RecursionError):
            records.append({})
    requests = Parser(model.config, model.tokenizer, sampling).requests(lines, source)
    items = []
    for entry, record in zip(requests, records, strict=True):
        answers = accepted(record.get("answer"))
        if not answers and not unanswered:
            raise BicacheError(f"{source}: request {entry.id!r} needs an 'answer', a string or a list of strings")
        items.append(Item(dataclasses.replace(entry, n=1), answers, str(record.get("kind", ""))))
    if not items:
        raise BicacheError(f"{source}: there are no requests in it")
    return items


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a policy's accuracy differs from the reference's on the same questions.

    Attributes:
        difference: accuracy less the reference's.
        interval: 95 % percentile bootstrap interval over questions, paired.
        p_value: exact McNemar test of equal accuracy.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float

    def to_json(self) -> dict[str, Any]:
        """The comparison as it stands in results."""
        low, high = self.interval
        return {
            "difference": round(self.difference, 6),
            "difference_interval": [round(low, 6), round(high, 6)],
            "mcnemar_p": self.p_value,
        }


def compare(right: Sequence[bool], reference: Sequence[bool], *, seed: int = 0, resamples: int = 2000) -> Comparison:
    """Compares two policies question by question.

    Args:
        right: whether the policy answered each question.
        reference: whether the other did.
        seed: seed of the bootstrap.
        resamples: its resamples.

    Returns:
        Difference, interval and p-value.
    """
    difference = np.asarray(right, float) - np.asarray(reference, float)
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    p_value = float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    means = np.random.default_rng(seed).choice(difference, (resamples, len(difference))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Comparison(float(difference.mean()), (float(low), float(high)), p_value)


def _answer_tokens(model: Model, result: Result) -> tuple[int, ...]:
    """Response tokens up to the first end of text: what follows is not part of an answer. Of a template all of them."""
    if result.holes:
        return result.decoded
    end = next((place for place, token in enumerate(result.token_ids) if token in model.config.eos_ids), None)
    return result.token_ids[:end]


def share(flags: Sequence[bool]) -> float:
    """The share of true ones, rounded as results have it."""
    return round(float(np.mean(flags)), 6)


def _breakdown(right: Sequence[bool], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[bool]] = {}
    for flag, label in zip(right, labels, strict=True):
        groups.setdefault(label, []).append(flag)
    return {label: {"exact_match": share(flags), "samples": len(flags)} for label, flags in sorted(groups.items())}


def breakdowns(right: Sequence[bool], items: Sequence[Item], ratios: Sequence[int]) -> dict[str, Any]:
    """Accuracy by kind of question and by prefix ratio, as results have it."""
    return {
        "by_kind": _breakdown(right, [item.kind for item in items]),
        "by_ratio": _breakdown(right, [_decade(ratio) for ratio in ratios]),
    }


def measure_speed(
    engines: Sequence[Engine],
    requests: Sequence[Request],
    *,
    turns: int = TURNS,
    seconds: float = 60.0,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Times engines on the same requests, in turns, so that a slow minute of the machine hits all alike.

    Each engine answers the requests once before, so that nothing is traced or compiled while the clock runs; prefixes
    are encoded again in every turn.

    Args:
        engines: one for each policy.
        requests: what they answer.
        turns: most turns.
        seconds: no turn begins after that, from the third on.
        progress: called with the number of responses after each run.

    Returns:
        Wall seconds [turns, engines].
    """
    times: list[list[float]] = []
    begun = 0.0
    while len(times) <= min(2, turns) or (len(times) <= turns and time.perf_counter() - begun < seconds):
        row = []
        for engine in engines:
            engine.prefixes.clear()
            started = time.perf_counter()
            engine.generate(requests)
            row.append(time.perf_counter() - started)
            progress(len(requests))
        begun = begun or time.perf_counter()
        times.append(row)
    return np.asarray(times[1:])


def _texts(model: Model, results: Sequence[Result]) -> list[str]:
    """Responses as text; token ids in words where the model has no tokenizer."""
    if model.tokenizer is not None:
        return [result.text or "" for result in results]
    return [" ".join(map(str, _answer_tokens(model, result))) for result in results]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What an engine answered.

    Attributes:
        right: whether each question was answered rightly.
        tokens: response tokens of each, up to the end of the text.
        boundaries: boundaries in use, ascending.
        intervals: refresh intervals in use, ascending.
    """

    right: list[bool]
    tokens: list[tuple[int, ...]]
    boundaries: list[int]
    intervals: list[int]


def ask(
    engine: Engine,
    items: Sequence[Item],
    requests: Sequence[Request],
    scorer: Scorer,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Asks an engine all questions.

    Args:
        engine: who is asked.
        items: the questions.
        requests: their requests, as they are run.
        scorer: decides whether a response is right.
        progress: called with the number of responses that have been made since.

    Raises:
        BicacheError: the scorer fails, or the model's logits are not finite.
    """
    answered: dict[str, Result] = {}
    for result in engine.stream(requests, partial=False):
        if result.error is not None:
            raise BicacheError(result.error)
        answered[result.id] = result
        progress(1)
    found = [answered[request.id] for request in requests]
    texts = _texts(engine.model, found)
    return Answers(
        [_score(scorer, text, item) for text, item in zip(texts, items, strict=True)],
        [_answer_tokens(engine.model, result) for result in found],
        sorted({result.boundary for result in found}),
        sorted({result.refresh_interval for result in found}),
    )


def evaluate(
    model: Model,
    items: Sequence[Item],
    policies: Sequence[str],
    *,
    cache: CacheConfig,
    sampling: SamplingConfig,
    scorer: Scorer = exact_match,
    batch_size: int | None = None,
    attention: str = "auto",
    timed: int = 100,
    turns: int = TURNS,
    progress: Callable[[int], None] = lambda done: None,
    formats: Mapping[str, Model] | None = None,
) -> list[dict[str, Any]]:
    """Runs the same questions under several policies.

    Args:
        model: the model.
        items: the questions.
        policies: names as `parse_policy` takes them; all are compared with `none` if it is among them, else with the
            first.
        cache: settings that policies share.
        sampling: decoding settings.
        scorer: decides whether a response is right.
        batch_size: most rows of a batch.
        attention: implementation of prefix attention (see `bicache_jax.kernels.prefix_attention`).
        timed: speed is measured on the first this many questions, see `measure_speed`; 0: not at all.
        turns: most turns of that.
        progress: called with the number of responses that have been made since.
        formats: the model with weights in other formats, by their names.

    Returns:
        For each policy its accuracy, agreement with `none`, speed and work; JSON values only, null what was not
        measured.

    Raises:
        BicacheError: there are no questions, or the scorer fails.
    """
    if not items:
        raise BicacheError("there are no questions to evaluate")
    caches = [parse_policy(name, cache) for name in policies]
    models = [{"": model, **(formats or {})}[weights_of(name)] for name in policies]
    requests = [
        dataclasses.replace(item.request, sampling=comparable_blocks(caches, item.request.sampling)) for item in items
    ]
    engines = [
        Engine(own, cache=way, sampling=sampling, batch_size=batch_size, attention=attention)
        for own, way in zip(models, caches, strict=True)
    ]
    ratios = prefix_ratios(model, requests, cache, sampling)
    answers = [ask(engine, items, requests, scorer, progress) for engine in engines]
    reference = answers[reference_of(policies)]
    stats = [engine.stats for engine in engines]
    place = reference_of(policies)
    times = measure_speed(engines, requests[:timed], turns=turns, progress=progress) if timed else None
    made = sum(request.sampling.gen_length for request in requests[:timed])
    results: list[dict[str, Any]] = []
    for index, name in enumerate(policies):
        own = answers[index]
        comparison = compare(own.right, reference.right)
        ratio = None if times is None else times[:, place] / times[:, index]
        agreement = [a == b for a, b in zip(own.tokens, reference.tokens, strict=True)]
        results.append(
            {
                "policy": name,
                "samples": len(items),
                "exact_match": share(own.right),
                "agreement": share(agreement) if "none" in policies else None,
                "compared_with": policies[place],
                **comparison.to_json(),
                "tokens_per_s": None if times is None else round(made / float(np.median(times[:, index])), 2),
                "ratio": None if ratio is None else round(float(np.median(ratio)), 3),
                "ratio_spread": None if ratio is None else [round(float(ratio.min()), 3), round(float(ratio.max()), 3)],
                "limit": _limit(engines[index], requests[:timed] if timed else requests),
                "forward_passes": stats[index].forward_passes,
                "prefixes_encoded": stats[index].prefixes_encoded,
                "boundaries": own.boundaries,
                "refresh_intervals": own.intervals,
                **breakdowns(own.right, items, ratios),
            }
        )
    return results


def _limit(engine: Engine, requests: Sequence[Request]) -> float | None:
    """Ratio of operations; none can be counted before the run where confidence decides how many steps there are."""
    if any(request.sampling.by_confidence for request in requests):
        return None
    return round(engine.plan(requests).gain, 3)


def _score(scorer: Scorer, text: str, item: Item) -> bool:
    try:
        return bool(scorer(text, item.answers))
    except Exception as error:  # the scorer may be the user's
        raise BicacheError(f"scorer: failed on request {item.request.id!r} ({type(error).__name__}: {error})") from None


def _decade(ratio: int) -> str:
    low = min(ratio, 99) // 10 * 10
    return f"{low}-{low + 9 if low < 90 else 100}"


def prefix_ratios(model: Model, requests: Sequence[Request], cache: CacheConfig, sampling: SamplingConfig) -> list[int]:
    """Prefix ratio of each request, whatever a policy makes of it."""
    cached = "exact" if model.config.block_causal else "naive"
    engine = Engine(model, cache=parse_policy(cached, cache), sampling=sampling)
    by_id = {row.request.id: row.ratio for row in engine.plan(requests).rows}
    return [by_id[request.id] for request in requests]
