"""Unmasking rules: which masked positions are unmasked first.

A rule is a pure function `(choice, noise) -> Score` of the head's statistics and standard Gumbel noise, both [B, W].
Positions with the highest scores are unmasked. The published code calls this remasking: all other candidates stay
masked.
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
        order: score to rank positions by, highest first.
        confidence: the same score in the published code's unit, to be divided by a temperature.
    """

    order: Float[Array, "B W"]
    confidence: Float[Array, "B W"]


Rule = Callable[[Choice, Array], Score]


def low_confidence(choice: Choice, noise_bw: Float[Array, "B W"]) -> Score:
    """Most probable token first (LLaDA, arXiv 2502.09992, algorithm 5; Dream's `maskgit_plus`)."""
    del noise_bw
    return Score(choice.log_odds, jax.nn.sigmoid(choice.log_odds))


def random(choice: Choice, noise_bw: Float[Array, "B W"]) -> Score:
    """Random order; the schedule decides how many (LLaDA's `random`).

    Dream's `origin` and algorithm 4 of LLaDA (arXiv 2502.09992) use the same order, but there chance also decides how
    many (`bicache_jax.decoding.schedule.chance_bars`).
    """
    return Score(noise_bw, vary_like(jnp.zeros_like(choice.log_odds), choice))


def topk_margin(choice: Choice, noise_bw: Float[Array, "B W"]) -> Score:
    """Largest margin over the second token first (Dream, arXiv 2508.15487)."""
    del noise_bw
    return Score(choice.margin, choice.margin)


def entropy(choice: Choice, noise_bw: Float[Array, "B W"]) -> Score:
    """Lowest entropy first (Dream, arXiv 2508.15487)."""
    del noise_bw
    return Score(-choice.entropy, -choice.entropy)


def sequential(choice: Choice, noise_bw: Float[Array, "B W"]) -> Score:
    """From left to right (SDAR)."""
    del noise_bw
    order = vary_like(
        jnp.broadcast_to(-jnp.arange(choice.log_odds.shape[1], dtype=jnp.float32), choice.log_odds.shape), choice
    )
    return Score(order, order)


_RULES: dict[str, Rule] = {
    "low_confidence": low_confidence,
    "random": random,
    "maskgit_plus": low_confidence,  # Dream's name for the same order
    "topk_margin": topk_margin,
    "entropy": entropy,
    "origin": random,
    "sequential": sequential,
}
RULES: tuple[Rule, ...] = tuple(_RULES[name] for name in REMASKING)


def order(
    remasking: Int[Array, ""], choice: Choice, noise_bw: Float[Array, "B W"], temperature: Float[Array, ""]
) -> Float[Array, "B W"]:
    """Scores by the rule in use: its own order, or random draws if the temperature is above 0.

    The n highest of `confidence / temperature + noise` are n draws without replacement with odds
    `exp(confidence / temperature)`: Dream's `alg_temp`.
    """
    score = jax.lax.switch(remasking, RULES, choice, noise_bw)
    drawn = score.confidence / jnp.where(temperature > 0, temperature, 1) + noise_bw
    return jnp.where(temperature > 0, drawn, score.order)


def ranks(score_bw: Float[Array, "B W"], candidate_bw: Bool[Array, "B W"]) -> Int[Array, "B W"]:
    """How many candidates come before each position: those with a higher score, or with an equal score to its left.

    All pairs are compared: for the few hundred positions of a block that runs and compiles faster than sorting.
    """
    mine, other = score_bw[:, :, None], score_bw[:, None, :]
    index = jnp.arange(score_bw.shape[1])
    before = (other > mine) | ((other == mine) & (index < index[:, None]))
    return jnp.sum(candidate_bw[:, None, :] & before, axis=-1)


def by_confidence(
    choice: Choice,
    candidate_bw: Bool[Array, "B W"],
    least: Int[Array, " B"],
    threshold: Float[Array, ""],
    factor: Float[Array, ""],
    entropy_bound: Float[Array, ""],
) -> Bool[Array, "B W"]:
    """Candidates unmasked by confidence: of Fast-dLLM (arXiv 2505.22618), at least the most probable one.

    Threshold (`factor` 0): all candidates that reach it, if these are `least` or more; else the `least` most probable
    ones (SDAR, LLaDA2). Factor rule (`threshold` 1): the n-th most probable candidate if its probability is at least
    `1 - factor / (n + 1)`. If only one candidate would be left, it is unmasked too, as in the published loop. Entropy
    rule (`entropy_bound` finite): candidates by ascending entropy, while the sum of their entropies stays below it.
    """
    bounded = jnp.isfinite(entropy_bound)
    least = jnp.where(bounded, 1, least)
    rank = ranks(jnp.where(bounded, -choice.entropy, choice.log_odds), candidate_bw)
    so_far = candidate_bw[:, None, :] & (rank[:, None, :] <= rank[:, :, None])
    together = jnp.sum(jnp.where(so_far, choice.entropy[:, None, :], 0), axis=-1)
    sure = jax.nn.sigmoid(choice.log_odds) >= threshold - factor / (rank + 2)
    sure = jnp.where(bounded, together < entropy_bound, sure)
    enough = jnp.sum(candidate_bw & sure, axis=-1) >= least
    chosen = candidate_bw & jnp.where(enough[:, None], sure, rank < least[:, None])
    left = jnp.sum(candidate_bw & ~chosen, axis=-1, keepdims=True)
    return chosen | (candidate_bw & (factor > 0) & (left == 1))
