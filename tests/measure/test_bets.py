"""The test by betting: its bound where it is known in closed form, and how often it errs."""

from __future__ import annotations

import numpy as np
import pytest

from bicache_jax.measure.bets import PARTS, STAKES, LossTest, at_most, least_shown, losses_needed


def test_wealth_is_what_bets_at_fair_odds_make():
    losses, bound = np.asarray([0.0, 0.5, -1.0, 0.25, 0.0, 0.0]), 0.3
    wealth = sum(
        part * np.prod([1 + stake / (1 - bound) * (bound - loss) for loss in losses])
        for part, stake in zip(PARTS, STAKES, strict=True)
    )
    # The confidence at which this wealth is just enough: a little less is within, a little more is not.
    told = [LossTest(bound, 1 - (1 + shift) / wealth) for shift in (1e-6, -1e-6)]
    for one in told:
        one.add(losses)
    assert [one.verdict() == "within" for one in told] == [True, False]
    assert told[0].mean == pytest.approx(-0.25 / 6) and len(told[0]) == 6


def test_how_many_losses_of_nothing_it_takes():
    needed = losses_needed(0.02, 0.95)
    assert least_shown(needed, 0.95) <= 0.02 < least_shown(needed - 1, 0.95)
    # Clopper and Pearson's bound for none of n is the best that there is; ours costs a factor that does not grow.
    assert 1 - 0.05 ** (1 / needed) < 0.02 < 1 - (0.05 * PARTS[0]) ** (1 / needed)
    none = LossTest(0.02, 0.95)
    assert none.verdict() == "open" and none.interval() == pytest.approx((-1, 1))
    none.add(np.zeros(needed))
    assert none.verdict() == "within" and none.interval()[1] <= 0.02


def test_bounds_are_symmetric_and_ordered():
    losses = np.random.default_rng(0).choice([-1.0, 0.0, 0.5, 1.0], 200, p=[0.1, 0.6, 0.1, 0.2])
    test = LossTest(0.1, 0.95)
    test.add(losses)
    low, high = test.interval()
    assert low < losses.mean() < high and low == -at_most(-losses, 0.95)
    assert at_most(losses, 0.99) > high
    for bound, verdict in ((low - 0.01, "outside"), (high + 0.01, "within"), (float(losses.mean()), "open")):
        other = LossTest(bound, 0.95)
        other.add(losses)
        assert other.verdict() == verdict


@pytest.mark.parametrize("chances", [(0.02, 0.0), (0.05, 0.03), (0.4, 0.38)])
def test_looking_often_errs_no_more_than_the_confidence_says(chances: tuple[float, float]) -> None:
    """The mean loss is 0.02, just outside of every smaller bound: how often is it said to be within one?"""
    lost, gained = chances
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        losses = rng.choice([1.0, -1.0, 0.0], 480, p=[lost, gained, 1 - lost - gained])
        test = LossTest(0.0199, 0.8)
        for part in losses.reshape(-1, 32):
            test.add(part)
            if test.verdict() == "within":
                wrong += 1
                break
    assert wrong <= 0.2 * 200 + 2 * np.sqrt(200 * 0.2 * 0.8)


def test_faults():
    with pytest.raises(ValueError, match="bound"):
        LossTest(1.0, 0.9)
    with pytest.raises(ValueError, match="confidence"):
        LossTest(0.1, 1.0)
    for bound in (0.0, 1.0):
        with pytest.raises(ValueError, match="bound"):
            losses_needed(bound, 0.9)
    assert losses_needed(1e-7, 0.95) > 1e7  # without so many numbers in memory
