"""What the prefix cache costs at each boundary, measured on questions, and what that says about a boundary table.

Similarity of keys and values picks a boundary without knowing what the model does with them; answers decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.table import Table
from bicache_jax.core.types import BicacheError, Model
from bicache_jax.measure.evaluate import (
    Item,
    ask,
    breakdowns,
    compare,
    prefix_ratios,
    share,
)
from bicache_jax.measure.profile import refuse_exact
from bicache_jax.measure.scorers import Scorer, exact_match
from bicache_jax.serving.engine import Engine

Judgement = Literal["safe", "unsafe", "open"]

MARGIN = 0.02
"""Accuracy that a cache may cost and still be called safe."""


def accuracy_by_boundary(
    model: Model,
    items: Sequence[Item],
    *,
    sampling: SamplingConfig,
    refresh_interval: int | Literal["auto"] = "auto",
    boundaries: Iterable[int] | None = None,
    scorer: Scorer = exact_match,
    batch_size: int | None = None,
    attention: str = "auto",
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Asks the same questions without a prefix cache, and with one at each boundary.

    Args:
        model: the model.
        items: the questions (`bicache_jax.measure.evaluate.items_of`).
        sampling: decoding settings that requests do not set themselves.
        refresh_interval: N.
        boundaries: those to measure; None: 0 to L.
        scorer: decides whether a response is right.
        batch_size: most rows of a batch.
        attention: implementation of prefix attention (see `bicache_jax.kernels.prefix_attention`).
        progress: called with the number of responses that have been made since; there are as many as questions for
            each boundary, and once more without a cache.

    Returns:
        For each boundary accuracy, its difference from no cache with an interval, and breakdowns; JSON values only.

    Raises:
        BicacheError: there are no questions, the model's caches are exact, a boundary is deeper than the model, or the
            scorer fails.
    """
    refuse_exact(model, model.name)
    if not items:
        raise BicacheError("there are no questions to ask")
    requests = [item.request for item in items]
    settings: dict[str, Any] = {"sampling": sampling, "batch_size": batch_size, "attention": attention}
    none = ask(Engine(model, cache=CacheConfig(policy="none"), **settings), items, requests, scorer, progress)
    ratios = prefix_ratios(model, requests, CacheConfig(), sampling)
    rows = []
    for boundary in range(model.config.num_layers + 1) if boundaries is None else boundaries:
        cache = CacheConfig(policy="bicache", boundary=boundary, refresh_interval=refresh_interval)
        found = ask(Engine(model, cache=cache, **settings), items, requests, scorer, progress)
        compared = compare(found.right, none.right).to_json()
        rows.append(
            {
                "boundary": boundary,
                "samples": len(items),
                "exact_match": share(found.right),
                "without_cache": share(none.right),
                **compared,
                **breakdowns(found.right, items, ratios),
            }
        )
    return rows


@dataclasses.dataclass(frozen=True, repr=False)
class Verdict:
    """How deep a cache may go by the answers measured.

    Attributes:
        margin: accuracy that a cache may cost and still be called safe.
        differences: by boundary, accuracy less that without a cache: (least, measured, most), 95 % interval. It is
            never narrower than what n questions leave open that show no difference, 3 / n to either side.
        samples: questions asked, n.
    """

    margin: float
    differences: Mapping[int, tuple[float, float, float]]
    samples: int

    def judge(self, boundary: int) -> Judgement:
        """Whether a boundary is safe.

        Args:
            boundary: b.

        Returns:
            `safe`: at this one and all shallower ones that were measured it costs less than the margin. `unsafe`: it
            costs accuracy, beyond chance. `open`: more questions are needed to tell, or it was not measured.
        """
        if boundary not in self.differences:
            return "open"
        if self.differences[boundary][2] < 0:
            return "unsafe"
        upto = [low for place, (low, _, _) in self.differences.items() if place <= boundary]
        return "safe" if min(upto) >= -self.margin else "open"

    def deepest(self) -> int | None:
        """The largest boundary that is safe; None if none is."""
        return max((boundary for boundary in self.differences if self.judge(boundary) == "safe"), default=None)

    def table(self) -> Table:
        """A line for each boundary."""
        rows = [
            (boundary, f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", self.judge(boundary))
            for boundary, (low, mean, high) in sorted(self.differences.items())
        ]
        return Table(
            ("boundary b", "difference to no cache, points (95 %)", "verdict"),
            rows,
            above=(f"{self.samples} questions; safe: at most {100 * self.margin:g} points lost",),
        )

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def verdict(rows: Sequence[Mapping[str, Any]], *, margin: float = MARGIN) -> Verdict:
    """What measurements say.

    Args:
        rows: what `accuracy_by_boundary` returned.
        margin: accuracy that a cache may cost and still be called safe.

    Raises:
        ValueError: there are no measurements, or the margin is not above 0.
    """
    if not rows or margin <= 0:
        raise ValueError(f"a verdict needs measurements and a margin above 0, got {len(rows)} rows and {margin}")
    differences = {}
    for row in rows:
        room = 3 / row["samples"]  # "rule of three": how often something may happen that n trials never showed
        mean, (low, high) = row["difference"], row["difference_interval"]
        differences[row["boundary"]] = (min(low, mean - room), mean, max(high, mean + room))
    return Verdict(margin, differences, rows[0]["samples"])
