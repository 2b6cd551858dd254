"""Masks of likelihood samples: spread as published, drawn from a request alone, and weighted to the bound itself."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from bicache_jax.core.masks import every, monte_carlo

WORDS = (1, 2, 3, 4)


def _counts(length: int, samples: int, batch: int, words: tuple[int, ...] = WORDS) -> np.ndarray:
    found = monte_carlo(words, length, samples, batch)
    return found.distinct[found.of_sample].sum(axis=1)


@pytest.mark.parametrize(("length", "samples", "batch"), [(5, 32, 8), (16, 16, 16), (40, 48, 16), (1, 4, 2)])
def test_numbers_of_masked_tokens_are_spread_as_published(length: int, samples: int, batch: int) -> None:
    counts = _counts(length, samples, batch)
    for begin in range(0, samples, batch):
        of_batch = counts[begin : begin + batch]
        first = of_batch[0]
        spread = np.round(np.linspace(first, first + (batch - 1) * (length / batch), batch)).astype(int)
        np.testing.assert_array_equal(of_batch, (spread - 1) % length + 1)
        if batch <= length:
            assert len(set(of_batch)) == batch, "without replacement"


def test_every_first_number_comes_and_every_token_is_masked() -> None:
    first = [_counts(6, 1, 1, (*WORDS, seed))[0] for seed in range(300)]
    assert min(np.bincount(first, minlength=7)[1:]) > 25
    masks = monte_carlo(WORDS, 12, 512, 16)
    share = masks.distinct[masks.of_sample].mean(axis=0)
    assert np.abs(share - share.mean()).max() < 0.1


def test_masks_follow_from_their_words_and_samples_only_add() -> None:
    few, many, other = (monte_carlo(words, 9, n, 8) for words, n in ((WORDS, 16), (WORDS, 64), ((9, 9), 16)))
    samples = [masks.distinct[masks.of_sample] for masks in (few, many, other)]
    np.testing.assert_array_equal(samples[0], samples[1][:16])
    assert (samples[0] != samples[2]).any()
    # Pinned: scores of earlier runs stay what they are.
    assert [int("".join(map(str, mask.astype(int))), 2) for mask in samples[0][:4]] == PINNED


PINNED = [118, 413, 191, 507]


def test_a_token_alone_has_one_mask() -> None:
    masks = monte_carlo(WORDS, 1, 128, 16)
    assert masks.distinct.tolist() == [[True]] and masks.batches == 8
    np.testing.assert_allclose(masks.estimates(np.asarray([-2.5])), [-2.5] * 8)


def test_samples_come_near_the_expectation_over_every_mask() -> None:
    """For any function of the masked tokens that is summed over them."""
    length = 5
    table = np.random.default_rng(0).normal(size=(2**length, length))

    def log_p(distinct: np.ndarray) -> np.ndarray:
        return (table[distinct @ (1 << np.arange(length))] * distinct).sum(axis=1)

    exact = every(length)
    assert len(exact.distinct) == 2**length - 1
    wanted = 0.0
    for count in range(1, length + 1):  # equation 14 of arXiv 2502.09992, term by term
        for places in itertools.combinations(range(length), count):
            mask = np.isin(np.arange(length), places)
            wanted += length / count * log_p(mask[None])[0] / math.comb(length, count) / length
    np.testing.assert_allclose(exact.estimates(log_p(exact.distinct)), [wanted])
    drawn = monte_carlo(WORDS, length, 2**14, 16)
    estimates = drawn.estimates(log_p(drawn.distinct))
    assert abs(estimates.mean() - wanted) < 4 * estimates.std() / math.sqrt(len(estimates))
