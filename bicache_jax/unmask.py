"""Which masked positions are unmasked in a step: rules over a block's running statistics, and the step itself.

A rule is a pure function `(choice, keys) -> score [B, W]`; the candidates with the highest scores are unmasked. What
the published code calls remasking is the same thing seen from the other side: all other candidates stay masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bicache_jax.backbone import Backbone, Params
from bicache_jax.cache import Decoding, Rows
from bicache_jax.config import REMASKING
from bicache_jax.head import Choice, choose

Rule = Callable[[Choice, Array], Array]


def low_confidence(choice: Choice, keys_bw: Key[Array, "B W"]) -> Float[Array, "B W"]:
    """Most probable token first (LLaDA, arXiv 2502.09992, algorithm 5; Dream's `maskgit_plus`)."""
    del keys_bw
    return choice.log_odds


def random(choice: Choice, keys_bw: Key[Array, "B W"]) -> Float[Array, "B W"]:
    """Any order alike (LLaDA, arXiv 2502.09992, algorithm 4)."""
    del choice
    return jax.vmap(jax.vmap(jax.random.uniform))(keys_bw)


def topk_margin(choice: Choice, keys_bw: Key[Array, "B W"]) -> Float[Array, "B W"]:
    """Largest margin over the runner-up first (Dream, arXiv 2508.15487)."""
    del keys_bw
    return choice.margin


def entropy(choice: Choice, keys_bw: Key[Array, "B W"]) -> Float[Array, "B W"]:
    """Lowest entropy first (Dream, arXiv 2508.15487)."""
    del keys_bw
    return -choice.entropy


_RULES: dict[str, Rule] = {
    "low_confidence": low_confidence,
    "random": random,
    "maskgit_plus": low_confidence,  # Dream's name for the same order
    "topk_margin": topk_margin,
    "entropy": entropy,
}
RULES: tuple[Rule, ...] = tuple(_RULES[name] for name in REMASKING)


def select(
    score_bw: Float[Array, "B W"], candidate_bw: Bool[Array, "B W"], count_b: Int[Array, " B"]
) -> Bool[Array, "B W"]:
    """The `count_b` candidates with the highest score; among equals the lower position goes first."""
    order = jnp.argsort(jnp.where(candidate_bw, -score_bw, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return candidate_bw & (rank < count_b[:, None])


def idle(rows: Rows, decoding: Decoding, index: Int[Array, ""]) -> Bool[Array, " B"]:
    """Rows that do nothing in step `index` of an interval.

    Those are complete rows, and with a confidence threshold those that have finished their block: they wait for the
    interval's end, since their refresh counter restarts with the next block.
    """
    return rows.done | (jnp.isfinite(decoding.threshold) & (index > 0) & (rows.block_step == 0))


def unmask(
    backbone: Backbone,
    params: Params,
    hidden_bwd: Float[Array, "B W D"],
    rows: Rows,
    decoding: Decoding,
    index: Int[Array, ""],
) -> Rows:
    """Unmasks a step's tokens in each row's current block and moves the row's counters.

    Args:
        backbone: the model (static).
        params: its parameters.
        hidden_bwd: hidden states that predict the block's positions, in front of the final norm.
        rows: the rows.
        decoding: what they share.
        index: step within the interval.

    Returns:
        The rows after the step.
    """
    config = backbone.config
    (num_rows, length), width = rows.tokens.shape, hidden_bwd.shape[1]
    active = ~idle(rows, decoding, index)
    by_threshold = jnp.isfinite(decoding.threshold)
    offset = rows.block[:, None] * decoding.block_length + jnp.arange(width)
    place = jnp.minimum(offset + int(config.shift_logits), length - 1)
    tokens = jnp.take_along_axis(rows.tokens, place, axis=1)
    candidate = (tokens == config.mask_id) & (jnp.arange(width) < decoding.block_length) & active[:, None]

    token_keys, order_keys = _keys(rows, offset)
    choice = choose(
        backbone.final_norm(params, hidden_bwd),
        *backbone.head(params),
        mask_id=config.mask_id,
        scale=decoding.scale,
        noise=decoding.noise,
        keys_bw=token_keys,
        vocab_size=config.vocab_size,
        axis=backbone.axis,
    )
    with jax.named_scope("unmask"):
        score = jax.lax.switch(decoding.remasking, RULES, choice, order_keys)
        count = decoding.counts[jnp.minimum(rows.block_step, decoding.counts.shape[0] - 1)]
        scheduled = select(score, candidate, count)
        sure = candidate & (jax.nn.sigmoid(choice.log_odds) >= decoding.threshold)
        surest = select(choice.log_odds, candidate, jnp.ones_like(rows.step))
        chosen = jnp.where(by_threshold, sure | surest, scheduled)
        anchor = candidate & (jnp.arange(width) == 0)
        chosen = jnp.where(decoding.anchor & (rows.block_step == 0)[:, None], anchor, chosen)
        updated = rows.tokens.at[jnp.arange(num_rows)[:, None], jnp.where(chosen, place, length)].set(
            choice.token, mode="drop"
        )

        left = jnp.any(candidate & ~chosen, axis=1)
        block_step = rows.block_step + active
        over = jnp.where(by_threshold, active & ~left, block_step == decoding.block_steps)
        block = rows.block + over
        complete = (block == decoding.num_blocks) | (active & (rows.block == decoding.num_blocks - 1) & ~left)
        return dataclasses.replace(
            rows,
            tokens=updated,
            step=rows.step + active,
            block=block,
            block_step=jnp.where(over, 0, block_step),
            done=rows.done | complete,
            forward_passes=rows.forward_passes + active,
        )


def _keys(rows: Rows, offset_bw: Int[Array, "B W"]) -> tuple[Key[Array, "B W"], Key[Array, "B W"]]:
    """Keys of a step's positions, for tokens and for their order: made of request, step and position alone."""

    def of_row(key: Array, step: Array, offsets: Array) -> Array:
        keys = jax.vmap(lambda at: jax.random.fold_in(jax.random.fold_in(key, step), at))(offsets)
        return jax.vmap(jax.random.split)(keys)

    keys_bw2 = jax.vmap(of_row)(rows.key, rows.step, offset_bw)
    return keys_bw2[..., 0], keys_bw2[..., 1]
