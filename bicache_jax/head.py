"""The LM head in vocabulary tiles: float32 logits of a whole vocabulary never exist for more than one tile.

Each tile updates a running choice, the log-sum-exp of everything else, and nothing more. Confidence is ranked by the
log-odds of the chosen token, `log p - log(1 - p)`: monotone in the softmax probability p, but it does not saturate
where p rounds to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from bicache_jax.numerics import precision

TILE = 8192


class Choice(NamedTuple):
    """The token chosen at each position.

    Attributes:
        token: argmax of the (noisy) logits, the mask token left out; the lowest id among equals.
        log_odds: log-odds of its softmax probability without noise, the mask token kept in the sum.
    """

    token: Int[Array, "B W"]
    log_odds: Float[Array, "B W"]


def choose(
    x_bwd: Float[Array, "B W D"],
    head_vd: Float[Array, "V D"],
    bias_v: Float[Array, " V"] | None = None,
    *,
    mask_id: int,
    scale: Float[Array, ""],
    noise: Float[Array, ""],
    keys_bw: Key[Array, "B W"],
) -> Choice:
    """Chooses a token at each position.

    Logits are multiplied by `scale`; the choice is made after Gumbel noise times `noise` is added, in log space and
    float32. `scale=1, noise=t` is LLaDA's `exp(logits) / (-log u) ** t` with confidence at temperature 1;
    `scale=1/t, noise=1` is sampling from the softmax at temperature t with confidence from it, as Dream has it. Noise is
    drawn by tile from the position's key, so it depends on nothing but that key.

    Args:
        x_bwd: normed hidden states of the block's positions.
        head_vd: rows of the head.
        bias_v: bias of the head, if it has one.
        mask_id: token that is never chosen.
        scale: factor of the logits.
        noise: factor of the noise; 0 draws none.
        keys_bw: noise key of each position.

    Returns:
        Token and confidence of each position.
    """
    vocab_size = head_vd.shape[0]
    tile = min(TILE, vocab_size)
    shape = x_bwd.shape[:2]

    def gumbel(index: Array) -> Array:
        def draw(key: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(key, index), (tile,), jnp.float32)

        return jax.vmap(jax.vmap(draw))(keys_bw)

    def step(index: Array, running: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        best, raw, token, rest = running
        first = index * tile
        start = jnp.minimum(first, vocab_size - tile)  # the last tile overlaps the one before it
        ids = start + jnp.arange(tile)
        rows_td = jax.lax.dynamic_slice_in_dim(head_vd, start, tile)
        logits = jnp.einsum(
            "bwd,td->bwt", x_bwd, rows_td, precision=precision(x_bwd.dtype), preferred_element_type=jnp.float32
        )
        if bias_v is not None:
            logits += jax.lax.dynamic_slice_in_dim(bias_v, start, tile).astype(jnp.float32)
        logits = jnp.where(ids >= first, logits * scale, -jnp.inf)
        noisy = jax.lax.cond(noise > 0, lambda: logits + noise * gumbel(index), lambda: logits)
        noisy = jnp.where(ids == mask_id, -jnp.inf, noisy)
        place = jnp.argmax(noisy, axis=-1)
        at = place[..., None]
        tile_best = jnp.take_along_axis(noisy, at, -1)[..., 0]
        tile_raw = jnp.take_along_axis(logits, at, -1)[..., 0]
        others = jnp.where(jnp.arange(tile) == at, -jnp.inf, logits)
        rest = jnp.logaddexp(rest, jax.nn.logsumexp(others, axis=-1))
        wins = tile_best > best
        rest = jnp.logaddexp(rest, jnp.where(wins, raw, tile_raw))
        return (
            jnp.where(wins, tile_best, best),
            jnp.where(wins, tile_raw, raw),
            jnp.where(wins, ids[place], token),
            rest,
        )

    lowest = jnp.full(shape, -jnp.inf)
    with jax.named_scope("head"):
        _, raw, token, rest = jax.lax.fori_loop(
            0, -(-vocab_size // tile), step, (lowest, lowest, jnp.zeros(shape, jnp.int32), lowest)
        )
    return Choice(token, raw - rest)
