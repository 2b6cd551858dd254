"""Rules that say which masked positions are unmasked first.

A rule is a pure function `(choice, noise) -> Score` over the head's running statistics and standard Gumbel noise, both
[B, W]; positions with the highest scores are unmasked. What the published code calls remasking is the same thing seen
from the other side: all other candidates stay masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bicache_jax.core.axes import vary_like
from bicache_jax.core.config import REMASKING
from bicache_jax.decoding.head import Choice


class Score(NamedTuple):
    """How early each position is unmasked.

    Attributes:
        order: the rank by it, highest first.
        confidence: the same in the published code's unit, which a temperature divides.
    """

    order: Float[Array, "B W"]
    confidence: Float[Array, "B W"]


Rule = Callable[[Choice, Array], Score]


def low_confidence(choice: Choice, noise_bw: Float[Array, "B W"]) -> Score:
    """Most probable token first (LLaDA, arXiv 2502.09992, algorithm 5; Dream's `maskgit_plus`)."""
    del noise_bw
    return Score(choice.log_odds, jax.nn.sigmoid(choice.log_odds))


def random(choice: Choice, noise_bw: Float[Array, "B W"]) -> Score:
    """Any order alike, as many as the schedule says (LLaDA's `random`).

    Dream's `origin` and algorithm 4 of LLaDA (arXiv 2502.09992) are the same order; there chance also decides how many
    (`bicache_jax.decoding.schedule.chance_bars`).
    """
    return Score(noise_bw, vary_like(jnp.zeros_like(choice.log_odds), choice))


def topk_margin(choice: Choice, noise_bw: Float[Array, "B W"]) -> Score:
    """Largest margin over the runner-up first (Dream, arXiv 2508.15487)."""
    del noise_bw
    return Score(choice.margin, choice.margin)


def entropy(choice: Choice, noise_bw: Float[Array, "B W"]) -> Score:
    """Lowest entropy first (Dream, arXiv 2508.15487)."""
    del noise_bw
    return Score(-choice.entropy, -choice.entropy)


_RULES: dict[str, Rule] = {
    "low_confidence": low_confidence,
    "random": random,
    "maskgit_plus": low_confidence,  # Dream's name for the same order
    "topk_margin": topk_margin,
    "entropy": entropy,
    "origin": random,
}
RULES: tuple[Rule, ...] = tuple(_RULES[name] for name in REMASKING)


def order(
    remasking: Int[Array, ""], choice: Choice, noise_bw: Float[Array, "B W"], temperature: Float[Array, ""]
) -> Float[Array, "B W"]:
    """Scores by the rule in use: its order, or above temperature 0 a draw.

    The n highest of `confidence / temperature + noise` are n draws without replacement with odds
    `exp(confidence / temperature)`: Dream's `alg_temp`.
    """
    score = jax.lax.switch(remasking, RULES, choice, noise_bw)
    drawn = score.confidence / jnp.where(temperature > 0, temperature, 1) + noise_bw
    return jnp.where(temperature > 0, drawn, score.order)


def ranks(score_bw: Float[Array, "B W"], candidate_bw: Bool[Array, "B W"]) -> Int[Array, "B W"]:
    """How many candidates go before each position: those of higher score, and of equal score to its left.

    Counted in pairs: for the few hundred positions of a block that is quicker to run, and to compile, than sorting.
    """
    mine, other = score_bw[:, :, None], score_bw[:, None, :]
    place = jnp.arange(score_bw.shape[1])
    before = (other > mine) | ((other == mine) & (place < place[:, None]))
    return jnp.sum(candidate_bw[:, None, :] & before, axis=-1)


def by_confidence(
    choice: Choice, candidate_bw: Bool[Array, "B W"], threshold: Float[Array, ""], factor: Float[Array, ""]
) -> Bool[Array, "B W"]:
    """Candidates that confidence alone unmasks: the most probable one, and what Fast-dLLM (arXiv 2505.22618) adds.

    Threshold (`factor` 0): all that reach it. Factor rule (`threshold` 1): the n-th most probable one if its
    probability is at least `1 - factor / (n + 1)`; and a single one that would be left is taken along, as the published
    loop has it.
    """
    rank = ranks(choice.log_odds, candidate_bw)
    sure = jax.nn.sigmoid(choice.log_odds) >= threshold - factor / (rank + 2)
    chosen = candidate_bw & (sure | (rank == 0))
    left = jnp.sum(candidate_bw & ~chosen, axis=-1, keepdims=True)
    return chosen | (candidate_bw & (factor > 0) & (left == 1))
