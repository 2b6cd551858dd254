"""The LM head in vocabulary tiles: float32 logits of a whole vocabulary never exist for more than one tile.

Each tile updates a few running statistics and is forgotten. Confidence is ranked by the log-odds of the chosen token,
`log p - log(1 - p)`: monotone in the softmax probability p, but it does not saturate where p rounds to 1.
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
        margin: probability of the most probable token less that of the runner-up.
        entropy: of the softmax, in nats.
    """

    token: Int[Array, "B W"]
    log_odds: Float[Array, "B W"]
    margin: Float[Array, "B W"]
    entropy: Float[Array, "B W"]


class _Running(NamedTuple):
    """Statistics over the tiles seen so far, each [B, W].

    Attributes:
        best: highest noisy logit.
        token: its token.
        raw: its logit without noise.
        rest: log-sum-exp of all logits but that one.
        first: highest logit, the mask token left out.
        second: highest of the others, mask token included.
        peak: highest logit of all.
        over: sum of `exp(logit - peak)` over the others, which stays exact where the peak is all but certain.
        weighted: sum of `exp(logit - peak) * (logit - peak)` over the others.
    """

    best: Array
    token: Array
    raw: Array
    rest: Array
    first: Array
    second: Array
    peak: Array
    over: Array
    weighted: Array


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
    `scale=1/t, noise=1` is sampling from the softmax at temperature t with confidence from it, as Dream has it. Noise
    is drawn by tile from the position's key, so it depends on nothing but that key.

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

    def pick(values: Array, at: Array) -> Array:
        return jnp.take_along_axis(values, at[..., None], -1)[..., 0]

    def without(values: Array, at: Array) -> Array:
        return jnp.where(jnp.arange(tile) == at[..., None], -jnp.inf, values)

    def step(index: Array, was: _Running) -> _Running:
        begin = index * tile
        start = jnp.minimum(begin, vocab_size - tile)  # the last tile overlaps the one before it
        ids = start + jnp.arange(tile)
        rows_td = jax.lax.dynamic_slice_in_dim(head_vd, start, tile)
        logits = jnp.einsum(
            "bwd,td->bwt", x_bwd, rows_td, precision=precision(x_bwd.dtype), preferred_element_type=jnp.float32
        )
        if bias_v is not None:
            logits += jax.lax.dynamic_slice_in_dim(bias_v, start, tile).astype(jnp.float32)
        logits = jnp.where(ids >= begin, logits * scale, -jnp.inf)
        allowed = jnp.where(ids == mask_id, -jnp.inf, logits)
        noisy = jax.lax.cond(noise > 0, lambda: allowed + noise * gumbel(index), lambda: allowed)

        place, top = jnp.argmax(noisy, axis=-1), jnp.argmax(allowed, axis=-1)
        best, raw, first = pick(noisy, place), pick(logits, place), pick(logits, top)
        second = jnp.max(without(logits, top), axis=-1)
        others = without(logits, jnp.argmax(logits, axis=-1))
        tile_peak = jnp.max(logits, axis=-1)
        below = jnp.where(jnp.isfinite(others), others - tile_peak[..., None], 0)
        weight = jnp.where(jnp.isfinite(others), jnp.exp(below), 0)
        peak = jnp.maximum(was.peak, tile_peak)
        over, weighted = jnp.zeros(shape), jnp.zeros(shape)
        for part_peak, part_over, part_weighted, is_top in (
            (was.peak, was.over, was.weighted, was.peak >= tile_peak),
            (tile_peak, weight.sum(-1), (weight * below).sum(-1), was.peak < tile_peak),
        ):
            shift = jnp.where(jnp.isfinite(part_peak), part_peak - peak, 0)
            factor = jnp.exp(part_peak - peak)
            count = part_over + ~is_top  # a peak that is overtaken becomes one of the others
            over += factor * count
            weighted += factor * (part_weighted + count * shift)
        wins = best > was.best
        rest = jnp.logaddexp(was.rest, jax.nn.logsumexp(without(logits, place), axis=-1))
        return _Running(
            best=jnp.maximum(best, was.best),
            token=jnp.where(wins, ids[place], was.token),
            raw=jnp.where(wins, raw, was.raw),
            rest=jnp.logaddexp(rest, jnp.where(wins, was.raw, raw)),
            first=jnp.maximum(first, was.first),
            second=jnp.maximum(jnp.minimum(first, was.first), jnp.maximum(second, was.second)),
            peak=peak,
            over=over,
            weighted=weighted,
        )

    lowest = jnp.full(shape, -jnp.inf)
    zero = jnp.zeros(shape)
    start = _Running(lowest, jnp.zeros(shape, jnp.int32), lowest, lowest, lowest, lowest, lowest, zero, zero)
    with jax.named_scope("head"):
        last = jax.lax.fori_loop(0, -(-vocab_size // tile), step, start)
    return Choice(
        token=last.token,
        log_odds=last.raw - last.rest,
        margin=(jnp.exp(last.first - last.peak) - jnp.exp(last.second - last.peak)) / (1 + last.over),
        entropy=jnp.log1p(last.over) - last.weighted / (1 + last.over),
    )
