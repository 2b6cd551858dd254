"""Whether a mean loss is within a bound, told as early as the losses allow: a test by betting.

Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (2024). Somebody bets on every
loss, at odds that would be fair if the mean were m. If it is at least m (or at most, for bets the other way), wealth
grows to 1 / alpha with a probability of alpha or less, however often one looks (Ville's inequality). So m is ruled out
once it has. Losses may be any numbers from -1 to 1, and no distribution is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Float

Verdict = Literal["within", "outside", "open"]

STAKES = np.array([1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125])
"""Shares of the largest bet that cannot end in debt, each kept up all the time by a part of the wealth: large ones win
where hardly anything is ever lost, small ones where much is lost and gained."""
PARTS = np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
"""The wealth that each of them begins with."""


def _log_wealth(losses: Float[np.ndarray, " n"], mean: float, times: int = 1) -> float:
    """Logarithm of what bets against a mean loss of at least `mean` (below 1) have become, after all losses `times`."""
    with np.errstate(divide="ignore"):  # a stake of all there is can lose it
        growth = times * np.log1p(STAKES[:, None] * (mean - losses) / (1 - mean)).sum(axis=1)
    return float(np.logaddexp.reduce(growth + np.log(PARTS)))


def at_most(losses: Float[np.ndarray, " n"], confidence: float, times: int = 1) -> float:
    """Smallest mean loss that is ruled out, with all above it; 1 if none is. Every loss came so many `times`."""
    low, high, wanted = -1.0, 1.0, -math.log1p(-confidence)
    for _ in range(40):  # wealth grows with the mean that is bet against
        middle = (low + high) / 2
        low, high = (low, middle) if _log_wealth(losses, middle, times) >= wanted else (middle, high)
    return high


class LossTest:
    """Losses so far, and what they say about their mean.

    Attributes:
        bound: largest mean loss that is acceptable.
        confidence: probability with which each of `within` and `outside` is right, however often one looks.
    """

    def __init__(self, bound: float, confidence: float) -> None:
        """Has seen nothing.

        Args:
            bound: largest mean loss that is acceptable, in -1..1.
            confidence: above 0 and below 1.

        Raises:
            ValueError: one of them is not.
        """
        if not -1 < bound < 1:
            raise ValueError(f"bound must lie between -1 and 1, got {bound}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
        self.bound, self.confidence = bound, confidence
        self._losses = np.zeros(0)

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, losses: Iterable[float]) -> None:
        """Takes further losses, each from -1 to 1."""
        self._losses = np.concatenate([self._losses, np.asarray(list(losses), float)])

    @property
    def mean(self) -> float:
        """The mean so far; 0 before the first."""
        return float(self._losses.mean()) if len(self) else 0.0

    def interval(self) -> tuple[float, float]:
        """Least and largest mean loss that are not ruled out, each with the confidence."""
        return -at_most(-self._losses, self.confidence), at_most(self._losses, self.confidence)

    def verdict(self) -> Verdict:
        """`within`: a mean above the bound is ruled out; `outside`: one of at most the bound is; `open`: neither."""
        wanted = -math.log1p(-self.confidence)
        if _log_wealth(self._losses, self.bound) >= wanted:
            return "within"
        return "outside" if _log_wealth(-self._losses, -self.bound) >= wanted else "open"


def least_shown(count: int, confidence: float) -> float:
    """The smallest bound that so many losses of 0 are within."""
    return at_most(np.zeros(1), confidence, count)


def losses_needed(bound: float, confidence: float) -> int:
    """How many losses of 0 it takes to be within a bound above 0.

    Raises:
        ValueError: the bound is not between 0 and 1, or the confidence is not.
    """
    for name, value in (("bound", bound), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    few, many = 0, 1
    while least_shown(many, confidence) > bound:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if least_shown(middle, confidence) <= bound else (middle, many)
    return many
