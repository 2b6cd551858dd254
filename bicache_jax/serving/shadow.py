"""Shadows: a share of the requests is answered again without a prefix cache, to see what the cache costs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

from bicache_jax.core.types import Result
from bicache_jax.serving.grouping import Row

LAST = -(2**31)
"""Priority of a shadow: it takes a place that nobody else wants."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How answers with and without a prefix cache agree.

    Attributes:
        responses: responses compared.
        same: those that are equal, token for token.
        tokens: share of equal tokens, mean over responses; 0 where none was compared.
        drift: how far the cache moves the first pass's predictions, where both look at the same canvas:
            Kullback-Leibler divergence in nats, mean over response tokens, then responses.
        most_drift: the largest of a token.
    """

    responses: int = 0
    same: int = 0
    tokens: float = 0.0
    drift: float = 0.0
    most_drift: float = 0.0

    def and_one(self, share: float, drift: tuple[float, float]) -> Agreement:
        """With another response: its share of equal tokens, and its mean and largest drift."""
        count = self.responses + 1
        return Agreement(
            count,
            self.same + (share == 1),
            self.tokens + (share - self.tokens) / count,
            self.drift + (drift[0] - self.drift) / count,
            max(self.most_drift, drift[1]),
        )


class Place(NamedTuple):
    """Where responses are compared: ratio in tens of percent, rounded down, and boundary."""

    ratio: int
    boundary: int


class Shadows:
    """Chooses requests, and compares answers."""

    def __init__(self, share: float) -> None:
        """Has compared nothing.

        Args:
            share: of the responses that use a prefix cache, 0 to 1.

        Raises:
            ValueError: it is not.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"shadow must be in 0..1, got {share!r:.80}")
        self._share = share
        self._asked: dict[int, tuple[Row, Row, tuple[int, ...]]] = {}  # by the identity of the shadow
        self._found: dict[Place, Agreement] = {}

    @property
    def found(self) -> dict[Place, Agreement]:
        """Agreement by ratio and boundary, so far."""
        return dict(sorted(self._found.items()))

    def of(self, row: Row, result: Result) -> Row | None:
        """The shadow of a finished row, where it is to have one.

        Which rows have one follows from their names and seeds, so that it is the same in every run.
        """
        if not row.prefix_len or result.finish_reason in (None, "error"):
            return None
        name = f"{row.request.id}/{row.sample}/{row.request.sampling.seed}".encode("utf-8", "surrogatepass")
        drawn = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") / 2**64
        if drawn >= self._share:
            return None
        shadow = dataclasses.replace(row, prefix_len=0, ratio=0, boundary=0, priority=LAST)
        self._asked[id(shadow)] = shadow, row, result.decoded
        return shadow

    def compare(self, shadow: Row, result: Result | None, drift: Callable[[Row], tuple[float, float]]) -> None:
        """Takes the answer of a shadow.

        Args:
            shadow: the row.
            result: its answer; None: there will be none.
            drift: measures how far the prefix cache of a row moves its predictions.
        """
        asked = self._asked.pop(id(shadow), None)
        if asked is None or result is None or result.finish_reason == "error":
            return
        _, row, tokens = asked
        place = Place(row.ratio // 10 * 10, row.boundary)
        share = sum(a == b for a, b in zip(tokens, result.decoded, strict=True)) / len(tokens)
        self._found[place] = self._found.get(place, Agreement()).and_one(share, drift(row))
