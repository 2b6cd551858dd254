"""Accuracy of several policies on the same requests, and whether their difference means anything."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from bicache_jax.config import BLOCK_CACHES, POLICIES, BlockCache, CacheConfig, Policy, SamplingConfig
from bicache_jax.engine import Engine
from bicache_jax.types import BicacheError, Model, Request, Result

Scorer = Callable[[str, Sequence[str]], bool]


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


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """The response is one of the answers, white space aside."""
    return text.split() in [answer.split() for answer in answers]


def numeric_match(text: str, answers: Sequence[str]) -> bool:
    """The last number of the response equals an answer (as GSM8K is scored; thousands separators allowed)."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return False
    value = float(found[-1].replace(",", ""))
    wanted = [re.findall(r"-?\d[\d,]*(?:\.\d+)?", answer) for answer in answers]
    return any(numbers and float(numbers[-1].replace(",", "")) == value for numbers in wanted)


def choice_match(text: str, answers: Sequence[str]) -> bool:
    """The first letter from A to J that stands alone in the response is the answer's."""
    found = re.search(r"(?<![A-Za-z])([A-J])(?![A-Za-z])", text)
    return found is not None and found[1] in [answer.strip().strip("().").upper() for answer in answers]


SCORERS: Mapping[str, Scorer] = {"exact": exact_match, "numeric": numeric_match, "choice": choice_match}


def find_scorer(name: str) -> Scorer:
    """A scorer by name, or by import path `package.module:function`.

    Raises:
        BicacheError: there is none of that name.
    """
    if name in SCORERS:
        return SCORERS[name]
    module, _, function = name.partition(":")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(SCORERS)
        raise BicacheError(
            f"scorer {name!r}: neither one of {known} nor importable as module:function ({error})"
        ) from None
    if not callable(scorer):
        raise BicacheError(f"scorer {name!r}: not a function (text, answers) -> bool")
    return scorer


def parse_policy(name: str, cache: CacheConfig) -> CacheConfig:
    """A policy as named on the command line: `none`, `naive`, `bicache`, each also with `+prefix` or `+dual`.

    Raises:
        BicacheError: the name is none of these.
    """
    policies: dict[str, Policy] = {policy: policy for policy in POLICIES}
    caches: dict[str, BlockCache] = {cache: cache for cache in BLOCK_CACHES}
    policy, _, block_cache = name.partition("+")
    if policy not in policies or (block_cache or "off") not in caches:
        raise BicacheError(f"policy {name!r}: must be one of {', '.join(POLICIES)}, each also with +prefix or +dual")
    return dataclasses.replace(
        cache,
        policy=policies[policy],
        block_cache=caches[block_cache or "off"],
        boundary=cache.boundary if policy == "bicache" else "auto",
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How a policy's accuracy differs from the first one's on the same questions.

    Attributes:
        difference: accuracy less the first policy's.
        interval: 95 % percentile bootstrap interval over questions, paired.
        p_value: exact McNemar test of equal accuracy.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float


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
    """Response tokens up to the first end of text: what is behind it is no part of an answer."""
    end = next((place for place, token in enumerate(result.token_ids) if token in model.config.eos_ids), None)
    return result.token_ids[:end]


def _share(flags: Sequence[bool]) -> float:
    return round(float(np.mean(flags)), 6)


def _breakdown(right: Sequence[bool], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[bool]] = {}
    for flag, label in zip(right, labels, strict=True):
        groups.setdefault(label, []).append(flag)
    return {label: {"exact_match": _share(flags), "samples": len(flags)} for label, flags in sorted(groups.items())}


def evaluate(
    model: Model,
    items: Sequence[Item],
    policies: Sequence[str],
    *,
    cache: CacheConfig,
    sampling: SamplingConfig,
    scorer: Scorer = exact_match,
    batch_size: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Runs the same questions under several policies.

    Args:
        model: the model.
        items: the questions.
        policies: names as `parse_policy` takes them; the first is what the others are compared with.
        cache: settings that policies share.
        sampling: decoding settings.
        scorer: decides whether a response is right.
        batch_size: most rows of a batch.
        progress: called for each finished response.

    Returns:
        For each policy its accuracy, agreement with the first, speed and work; JSON values only.
    """
    results: list[dict[str, Any]] = []
    requests = [item.request for item in items]
    ratios = _ratios(model, requests, cache, sampling)
    reference: tuple[list[bool], list[tuple[int, ...]], float] | None = None
    for name in policies:
        engine = Engine(model, cache=parse_policy(name, cache), sampling=sampling, batch_size=batch_size)
        answered: dict[str, Result] = {}
        for result in engine.stream(requests, partial=False):
            answered[result.id] = result
            progress()
        found = [answered[request.id] for request in requests]
        right = [scorer(result.text or "", item.answers) for result, item in zip(found, items, strict=True)]
        tokens = [_answer_tokens(model, result) for result in found]
        stats = engine.stats
        speed = stats.tokens / max(stats.seconds - stats.compile_seconds, 1e-9)
        if reference is None:
            reference = right, tokens, speed
        comparison = compare(right, reference[0])
        boundaries = sorted({result.boundary for result in found})
        results.append(
            {
                "policy": name,
                "samples": len(items),
                "exact_match": _share(right),
                "agreement": _share([a == b for a, b in zip(tokens, reference[1], strict=True)]),
                "difference": round(comparison.difference, 6),
                "difference_interval": [round(value, 6) for value in comparison.interval],
                "mcnemar_p": comparison.p_value,
                "tokens_per_s": round(speed, 2),
                "ratio": round(speed / reference[2], 3),
                "forward_passes": stats.forward_passes,
                "prefixes_encoded": stats.prefixes_encoded,
                "boundaries": boundaries,
                "by_kind": _breakdown(right, [item.kind for item in items]),
                "by_ratio": _breakdown(right, [f"{ratio // 10 * 10}-{ratio // 10 * 10 + 9}" for ratio in ratios]),
            }
        )
    return results


def _ratios(model: Model, requests: Sequence[Request], cache: CacheConfig, sampling: SamplingConfig) -> list[int]:
    """Prefix ratio of each request, whatever a policy makes of it."""
    engine = Engine(model, cache=parse_policy("naive", cache), sampling=sampling)
    by_id = {row.request.id: row.ratio for row in engine.plan(requests).rows}
    return [by_id[request.id] for request in requests]
