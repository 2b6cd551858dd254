"""Which tokens of a text are masked when its likelihood is estimated: LLaDA's Monte Carlo samples, and all there are.

The bound on a text's log-likelihood (LLaDA, arXiv 2502.09992, equations 6 and 14) is an expectation over how many of
its L tokens are masked, each number x from 1 to L as likely as any other, and over which: the mean of `L / x` times the
sum of the masked tokens' log-probabilities. Everything here is NumPy on the host.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """The masks of a text's samples.

    Equal masks are one: what a model says of them is the same, so it is asked once.

    Attributes:
        distinct: the masks, True where a token is masked.
        of_sample: the mask of each sample.
        weights: factor of the sum of a sample's log-probabilities; the estimate is the sum over samples.
        batches: batches into which the samples are divided evenly, in order; each is an estimate by itself.
    """

    distinct: Bool[np.ndarray, "M L"]
    of_sample: Int[np.ndarray, " S"]
    weights: Float[np.ndarray, " S"]
    batches: int = 1

    def estimates(self, log_p: Float[np.ndarray, " M"]) -> Float[np.ndarray, " N"]:
        """The estimate of each batch, from the sum of masked tokens' log-probabilities under each distinct mask."""
        values = self.weights * np.asarray(log_p, np.float64)[self.of_sample]
        return self.batches * values.reshape(self.batches, -1).sum(axis=1)


def _of_samples(masked: np.ndarray, weights: np.ndarray, batches: int = 1) -> Masks:
    """`Masks` from those of all samples; distinct ones in the order in which they first come."""
    _, first, inverse = np.unique(np.packbits(masked, axis=1), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return Masks(masked[first[order]], place[inverse.reshape(-1)], weights, batches)


def monte_carlo(words: Sequence[int], length: int, samples: int, batch: int) -> Masks:
    """Samples as LLaDA's evaluation draws them (`get_log_likelihood`, `eval_llada.py` of ML-GSAI/LLaDA).

    The numbers of masked tokens in a batch are spread evenly: the first is drawn from 1 to L, the others follow in
    steps of `L / batch`, around the end. So they come without replacement where the batch is not larger than L. Which
    tokens are masked is drawn for each sample. Texts of equal words and length get equal masks, and of unequal lengths
    similar numbers, so that the error that choices have in common does not count when they are compared.

    Args:
        words: integers from which everything is drawn (`bicache_jax.core.layout.noise_words`, and more).
        length: L.
        samples: number of samples, a multiple of `batch`.
        batch: samples whose numbers are spread evenly.
    """
    masked = np.empty((samples, length), bool)
    counts = np.empty(samples, np.int64)
    for begin in range(0, samples, batch):
        # Only the raw bits: NumPy promises these, and nothing else that it draws, for all releases to come.
        raw = np.random.PCG64(np.random.SeedSequence([*words, begin // batch])).random_raw(1 + length * batch)
        start = 1 + min(length - 1, int((int(raw[0]) >> 11) * 2.0**-53 * length))
        spread = np.linspace(start, start + (batch - 1) * (length / batch), batch)
        drawn = (np.round(spread).astype(np.int64) - 1) % length + 1
        rank = np.argsort(np.argsort(raw[1:].reshape(length, batch), axis=0), axis=0)
        masked[begin : begin + batch] = (rank < drawn).T
        counts[begin : begin + batch] = drawn
    return _of_samples(masked, length / counts / samples, samples // batch)


def at_once(length: int) -> Masks:
    """One sample: all tokens are masked. The estimate takes them for independent of each other."""
    return Masks(np.ones((1, length), bool), np.zeros(1, np.int64), np.ones(1))


def every(length: int) -> Masks:
    """Every set of masked tokens, weighted as often as it is drawn: the expectation itself.

    Args:
        length: L; there are `2 ** L - 1` sets.
    """
    sets = itertools.product((True, False), repeat=length)
    masked = np.asarray([one for one in sets if any(one)])
    counts = masked.sum(axis=1)
    chances = np.asarray([1 / (length * math.comb(length, int(count))) for count in counts])
    return Masks(masked, np.arange(len(masked)), chances * length / counts)
