"""A boundary table chosen by what caches do to answers.

Each calibration request is answered without a prefix cache and with one, and what is lost from the first answer to the
second is a number from -1 to 1: with an `answer` of its own, whether it was answered rightly; without one, the share of
the plain answer's tokens that differ. The largest boundary whose mean loss is shown to stay within a bound is chosen
for each prefix ratio, then the largest refresh interval over these boundaries. Both searches bisect, which assumes that
a deeper cache never loses less, and try the neighbour below what they find. A boundary is given up, or accepted, as
soon as enough requests have said so (`bicache_jax.measure.bets`); where all of them leave it open, a smaller one is
taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from bicache_jax.core.boundary import BoundaryTable
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.types import BicacheError, Model
from bicache_jax.measure.bets import LossTest, Verdict, least_shown, losses_needed
from bicache_jax.measure.evaluate import Item, ask
from bicache_jax.measure.profile import THRESHOLD, Sample, measure, refuse_exact, shallow_layers
from bicache_jax.measure.scorers import Scorer, exact_match
from bicache_jax.serving.engine import Engine

MAX_LOSS = 0.005
"""Mean loss that a cache may cost where none is named, if there are requests enough to show it."""
CONFIDENCE = 0.95
LOOKS = 64, 256
"""Requests that are answered before the first look at their losses, and most of them between two; until then each look
doubles what was asked. Fewer would fill no batches."""
PROXIES = 8
"""Requests on which the cheap measures are taken."""
ROOM = 4
"""An entry of the table gets this many times the requests that show the bound where nothing is ever lost."""

Known = MutableMapping[str, Mapping[str, Any]]
"""Answers that are there already, by `cache/request`: `{"right": bool, "tokens": [int...]}`."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What answers say about one boundary, or one refresh interval.

    Attributes:
        boundary: b; None where each request has its own.
        refresh_interval: N.
        requests: how many were answered until it was told.
        loss: mean loss on them.
        at_least: smallest mean loss that they do not rule out.
        at_most: largest mean loss that they do not rule out.
        verdict: `within` the bound, `outside`, or `open`.
        drift: what the cache does to the predictions of the first pass, mean Kullback-Leibler divergence in nats over
            a few requests and their response tokens (`bicache_jax.decoding.drift`); None: not measured.
    """

    boundary: int | None
    refresh_interval: int
    requests: int
    loss: float
    at_least: float
    at_most: float
    verdict: Verdict
    drift: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in a table."""
        record = dataclasses.asdict(self)
        for name in ("loss", "at_least", "at_most", "drift"):
            record[name] = None if record[name] is None else round(record[name], 6)
        return {name: value for name, value in record.items() if value is not None}


def largest_within(candidates: Sequence[int], test: Callable[[int], Evidence]) -> int | None:
    """The largest candidate that a test finds within its bound, by bisection, the largest tried first.

    Args:
        candidates: ascending; a larger one is taken to lose at least as much.
        test: tests a candidate. Where the neighbour below the one found is outside, that is not so, and only what lies
            below it is trusted.

    Returns:
        The candidate; None if none is found within.
    """
    found: dict[int, Evidence] = {}

    def verdict(place: int) -> Verdict:
        if place not in found:
            found[place] = test(candidates[place])
        return found[place].verdict

    above = len(candidates)
    while above > 0:
        low, high, place = -1, above, above - 1
        while high - low > 1:
            low, high = (place, high) if verdict(place) == "within" else (low, place)
            place = (low + high) // 2
        if low <= 0 or verdict(low - 1) != "outside":
            return None if low < 0 else candidates[low]
        above = low - 1
    return None


class _Trials:
    """Answers requests under caches, and keeps every answer."""

    def __init__(
        self,
        model: Model,
        items: Sequence[Item],
        settings: Mapping[str, Any],
        scorer: Scorer,
        known: Known,
        progress: Callable[[int], None],
    ) -> None:
        self._model, self._items, self._settings, self._progress = model, items, settings, progress
        self.known = known
        self._engines: dict[str, Engine] = {}
        self._scorer: Scorer = lambda text, answers: bool(answers) and scorer(text, answers)

    def engine(self, boundary: int | None, interval: int) -> tuple[str, Engine]:
        """The engine of a boundary (None: without a prefix cache), and its name."""
        name = "none" if boundary is None else f"{boundary}/{interval}"
        if name not in self._engines:
            # Each keeps prefixes of its own: there is room for those of two.
            self._engines = {kept: engine for kept, engine in self._engines.items() if kept == "none"}
            cache = CacheConfig(policy="none")
            if boundary is not None:
                cache = CacheConfig(policy="bicache", boundary=boundary, refresh_interval=interval)
            self._engines[name] = Engine(self._model, cache=cache, **self._settings)
        return name, self._engines[name]

    def _answers(self, boundary: int | None, interval: int, places: Sequence[int]) -> list[Mapping[str, Any]]:
        name, engine = self.engine(boundary, interval)
        keys = [f"{name}/{self._items[place].request.id}" for place in places]
        todo = [self._items[place] for place, key in zip(places, keys, strict=True) if key not in self.known]
        if todo:
            found = ask(engine, todo, [item.request for item in todo], self._scorer, self._progress)
            for item, right, tokens in zip(todo, found.right, found.tokens, strict=True):
                self.known[f"{name}/{item.request.id}"] = {"right": right, "tokens": list(tokens)}
        return [self.known[key] for key in keys]

    def losses(self, boundaries: Sequence[int], interval: int, places: Sequence[int]) -> list[float]:
        """What is lost from no cache to the one of each request's boundary."""
        lost = dict(zip(places, self._answers(None, 0, places), strict=True))
        found: dict[int, float] = {}
        for boundary in sorted(set(boundaries)):
            here = [place for place, own in zip(places, boundaries, strict=True) if own == boundary]
            for place, answer in zip(here, self._answers(boundary, interval, here), strict=True):
                found[place] = loss_of(lost[place], answer, scored=bool(self._items[place].answers))
        return [found[place] for place in places]

    def drift(self, boundary: int, interval: int, places: Sequence[int]) -> float:
        """Mean divergence of the first pass's predictions."""
        engine = self.engine(boundary, interval)[1]
        rows = engine.plan([self._items[place].request for place in places]).rows
        return float(np.mean([engine.executor.drift(row)[0] for row in rows]))


def loss_of(plain: Mapping[str, Any], cached: Mapping[str, Any], *, scored: bool) -> float:
    """What a cache costs one request, from -1 to 1.

    Args:
        plain: its answer without a cache: `right`, and `tokens` up to the end of the text.
        cached: its answer with one.
        scored: whether it is known what is right. Otherwise the loss is the share of places, of the longer answer's,
            in which the two differ.
    """
    if scored:
        return float(plain["right"]) - float(cached["right"])
    a, b = plain["tokens"], cached["tokens"]
    most = max(len(a), len(b))
    return 1 - sum(x == y for x, y in zip(a, b, strict=False)) / most if most else 0.0


def merged_ratios(ratios: Sequence[int], step: int, least: int) -> dict[int, list[int]]:
    """Requests by entry of the table.

    Args:
        ratios: r of each request.
        step: percent from one ratio to the next.
        least: requests of an entry; ratios that have fewer share one, except that there is always one.

    Returns:
        Places of the requests, by the entry's smallest ratio.
    """
    floors = [ratio // step * step for ratio in ratios]
    groups: list[tuple[int, list[int]]] = []
    for floor in sorted(set(floors)):
        members = [place for place, own in enumerate(floors) if own == floor]
        if groups and len(groups[-1][1]) < least:
            groups[-1][1].extend(members)
        else:
            groups.append((floor, members))
    if len(groups) > 1 and len(groups[-1][1]) < least:
        groups[-2][1].extend(groups.pop()[1])
    return dict(groups)


def intervals_up_to(steps: int, first: int) -> list[int]:
    """Refresh intervals to try: powers of two below the steps of a response, and one that refreshes it once."""
    once = first if first >= steps else 1 << (steps - 1).bit_length()
    return [*(1 << power for power in range(steps.bit_length()) if 1 << power < steps), once]


def boundaries_by_answers(
    model: Model,
    items: Sequence[Item],
    *,
    sampling: SamplingConfig,
    max_loss: float | None = None,
    confidence: float = CONFIDENCE,
    scorer: Scorer = exact_match,
    ratio_step: int = 5,
    threshold: float = THRESHOLD,
    seed: int = 0,
    attention: str = "auto",
    known: Known | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> BoundaryTable:
    """Makes a boundary table by answers, as `bicache profile --criterion answers` does.

    Args:
        model: the model.
        items: calibration requests (`bicache_jax.measure.evaluate.items_of`), with or without answers; those without a
            prefix are left out.
        sampling: decoding settings that requests do not set themselves; as they will be asked.
        max_loss: largest mean loss, between 0 and 1; None: `MAX_LOSS`, or what so few requests can show.
        confidence: with which a boundary that is chosen loses no more, each tested boundary by itself.
        scorer: decides whether a response is right.
        ratio_step: percent from one ratio to the next; ratios with few requests share an entry.
        threshold: similarity for what the table says beside it of the published criterion.
        seed: of the order in which requests are asked.
        attention: implementation of attention (see `bicache_jax.kernels.prefix_attention`).
        known: answers of an earlier run, to which new ones are added.
        progress: called with the number of responses that have been made since.

    Returns:
        The table, with the evidence in `answers`.

    Raises:
        BicacheError: the model's caches are exact, no request has a prefix, or the scorer fails.
        ValueError: `max_loss` or `confidence` is out of range.
    """
    refuse_exact(model, model.name)
    items, ratios = _with_prefixes(model, items, sampling)
    if not items:
        raise BicacheError("no request has a shared prefix to measure; give 'prefix_len'")
    bound = max(MAX_LOSS, least_shown(len(items), confidence)) if max_loss is None else max_loss
    interval = CacheConfig(policy="bicache", boundary=0).interval(sampling)
    settings = {"sampling": sampling, "attention": attention}
    trials = _Trials(model, items, settings, scorer, {} if known is None else known, progress)
    few = losses_needed(bound, confidence)
    order: list[int] = np.random.default_rng(seed).permutation(len(items)).tolist()
    turn = np.argsort(order).tolist()
    groups = merged_ratios(ratios, ratio_step, ROOM * few)
    layers = model.config.num_layers
    candidates = [boundary for boundary in range(layers + 1) if boundary != layers - 1]  # L - 1 is the same as L

    def tested(boundary_of: Callable[[int], int], own: int | None, interval: int, places: Sequence[int]) -> Evidence:
        told = LossTest(bound, confidence)
        while len(told) < len(places) and told.verdict() == "open":
            part = places[len(told) :][: min(max(LOOKS[0], len(told)), LOOKS[1])]
            told.add(trials.losses([boundary_of(place) for place in part], interval, part))
        low, high = told.interval()
        drift = None if own is None else trials.drift(own, interval, places[:PROXIES])
        return Evidence(own, interval, len(told), told.mean, low, high, told.verdict(), drift)

    chosen: dict[int, int] = {}
    similarity: dict[int, tuple[float, ...]] = {}
    evidence: dict[str, Any] = {}
    for ratio, members in groups.items():
        places = sorted(members, key=turn.__getitem__)
        log: list[Evidence] = []

        def test(boundary: int, places: Sequence[int] = places, log: list[Evidence] = log) -> Evidence:
            log.append(tested(lambda place: boundary, boundary, interval, places))
            return log[-1]

        found = largest_within(candidates, test)
        chosen[ratio] = found or 0
        similarity[ratio] = _similarity(model, [items[place] for place in places[:PROXIES]], attention)
        evidence[str(ratio)] = {
            "requests": len(members),
            "shown": found is not None,
            "boundary_by_similarity": shallow_layers(similarity[ratio], threshold),
            "tested": [one.to_json() for one in sorted(log, key=lambda one: one.boundary or 0)],
        }
    # A table does not decrease: what a higher ratio cannot take, a lower one does not get.
    lowest = np.minimum.accumulate(list(chosen.values())[::-1])[::-1]
    table = {ratio: int(boundary) for ratio, boundary in zip(chosen, lowest, strict=True)}
    own = {place: table[ratio] for ratio, members in groups.items() for place in members}
    by_interval: list[Evidence] = []

    def test_interval(interval: int) -> Evidence:
        by_interval.append(tested(own.__getitem__, None, interval, order))
        return by_interval[-1]

    longest = None
    if min(own.values()) < layers - 1:  # otherwise there is nothing to refresh
        steps = max(item.request.sampling.num_steps for item in items)
        longest = largest_within(intervals_up_to(steps, interval), test_interval)
    return BoundaryTable(
        model=model.name,
        fingerprint=model.fingerprint,
        num_layers=layers,
        threshold=threshold,
        samples_per_ratio=min(map(len, groups.values())),
        table=table,
        similarity=similarity,
        criterion="answers",
        refresh_interval=longest,
        answers={
            "max_loss": round(bound, 6),
            "confidence": confidence,
            "refresh_interval": interval,
            "requests": len(items),
            "with_answers": sum(bool(item.answers) for item in items),
            "decodes": len(trials.known),
            "by_ratio": evidence,
            "by_interval": [one.to_json() for one in sorted(by_interval, key=lambda one: one.refresh_interval)],
        },
    )


def summary(table: BoundaryTable) -> list[str]:
    """What a table by answers says, in lines for people.

    Args:
        table: from `boundaries_by_answers`.
    """
    answers: Mapping[str, Any] = table.answers or {}
    bound, confidence = 100 * answers["max_loss"], 100 * answers["confidence"]
    lines = [
        f"{answers['requests']} requests, {answers['decodes']} responses; within: a loss above {bound:.3g} points is"
        f" ruled out ({confidence:g} %)"
    ]
    for ratio, boundary in table.table.items():
        found = answers["by_ratio"][str(ratio)]
        lines.append(
            f"r >= {ratio} %: b = {boundary} (by similarity {found['boundary_by_similarity']})"
            + ("" if found["shown"] else ": not even b = 0 was shown to lose so little")
        )
        for one in found["tested"]:
            lines.append(
                f"  b = {one['boundary']}: loss {100 * one['loss']:+.1f} points ({100 * one['at_least']:+.1f} to"
                f" {100 * one['at_most']:+.1f}) on {one['requests']} requests, first pass moved by"
                f" {one['drift']:.2g} nats: {one['verdict']}"
            )
    for one in answers["by_interval"]:
        lines.append(
            f"N = {one['refresh_interval']}: loss {100 * one['loss']:+.1f} points ({100 * one['at_least']:+.1f} to"
            f" {100 * one['at_most']:+.1f}) on {one['requests']} requests: {one['verdict']}"
        )
    if table.refresh_interval is not None:
        lines.append(f"longest refresh interval within the bound: --refresh-interval {table.refresh_interval}")
    return lines


def _with_prefixes(model: Model, items: Iterable[Item], sampling: SamplingConfig) -> tuple[list[Item], list[int]]:
    """Requests that have a prefix, which is theirs from now on whoever else is asked, and their ratios."""
    asked = {item.request.id: item for item in items}
    if not asked:
        return [], []
    plan = Engine(model, cache=CacheConfig(policy="naive"), sampling=sampling).plan(
        [item.request for item in asked.values()]
    )
    rows = {row.request.id: row for row in plan.rows if row.prefix_len}
    kept = [item for name, item in asked.items() if name in rows]
    pinned = [
        dataclasses.replace(
            item, request=dataclasses.replace(item.request, prefix_len=rows[item.request.id].prefix_len)
        )
        for item in kept
    ]
    return pinned, [rows[item.request.id].ratio for item in kept]


def _similarity(model: Model, items: Sequence[Item], attention: str) -> tuple[float, ...]:
    """Mean similarity by layer of the requests' prefixes, alone and before their masked responses."""
    samples = []
    for item in items:
        request = item.request
        samples.append(Sample(request.canvas(model.config.mask_id), request.prefix_len or 0, 0))
    found = [layers for _, layers in measure(model, samples, attention=attention)]
    return tuple(round(float(value), 6) for value in np.mean(found, axis=0))
