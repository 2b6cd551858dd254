"""Which masked positions are unmasked in a step: rules over a block's running statistics, and the schedule.

A rule is a pure function `(choice, keys) -> score [B, W]`; the candidates with the highest scores are unmasked. What the
published code calls remasking is the same thing seen from the other side: all other candidates stay masks.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bicache_jax.config import REMASKING
from bicache_jax.head import Choice

Rule = Callable[[Choice, Array], Array]


def low_confidence(choice: Choice, keys_bw: Key[Array, "B W"]) -> Float[Array, "B W"]:
    """Most probable token first (LLaDA, arXiv 2502.09992, algorithm 5)."""
    del keys_bw
    return choice.log_odds


def random(choice: Choice, keys_bw: Key[Array, "B W"]) -> Float[Array, "B W"]:
    """Any order alike (LLaDA, arXiv 2502.09992, algorithm 4)."""
    del choice
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key)))(keys_bw)


_RULES: dict[str, Rule] = {"low_confidence": low_confidence, "random": random}
RULES: tuple[Rule, ...] = tuple(_RULES[name] for name in REMASKING)


def scheduled_count(
    block_length: Int[Array, ""], block_steps: Int[Array, ""], block_step: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Tokens that a step unmasks: `block_length // block_steps`, one more in the first `block_length % block_steps`."""
    return block_length // block_steps + (block_step < block_length % block_steps)


def select(
    score_bw: Float[Array, "B W"], candidate_bw: Bool[Array, "B W"], count_b: Int[Array, " B"]
) -> Bool[Array, "B W"]:
    """The `count_b` candidates with the highest score; among equals the lower position goes first."""
    order = jnp.argsort(jnp.where(candidate_bw, -score_bw, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return candidate_bw & (rank < count_b[:, None])
