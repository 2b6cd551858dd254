"""The LM head in vocabulary tiles: float32 logits of a whole vocabulary never exist for more than one tile.

Each tile updates a few running statistics and is forgotten. Confidence is ranked by the log-odds of the chosen token,
`log p - log(1 - p)`: monotone in the softmax probability p, but it does not saturate where p rounds to 1.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from bicache_jax.numerics import precision

TILE = 2048
NOISE_BLOCK = 128
"""Noise is drawn for this many tokens from one key, whatever tile or shard asks for it."""


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


class _Mass(NamedTuple):
    """Softmax statistics of some logits, relative to their highest, each [B, W].

    The sums leave that one out: what is small beside it stays exact where it is all but certain.

    Attributes:
        peak: highest logit.
        over: sum of `exp(logit - peak)` over the others.
        weighted: sum of `exp(logit - peak) * (logit - peak)` over the others.
    """

    peak: Array
    over: Array
    weighted: Array

    def __or__(self, other: _Mass) -> _Mass:
        """Statistics of both sets of logits."""
        peak = jnp.maximum(self.peak, other.peak)
        over, weighted = jnp.zeros_like(peak), jnp.zeros_like(peak)
        for part, is_top in ((self, self.peak >= other.peak), (other, self.peak < other.peak)):
            empty = jnp.isneginf(part.peak)
            shift = jnp.where(empty, 0, part.peak - peak)
            factor = jnp.where(empty, 0, jnp.exp(shift))
            count = part.over + ~is_top  # a peak that is overtaken becomes one of the others
            over += factor * count
            weighted += factor * (part.weighted + count * shift)
        return _Mass(peak, over, weighted)


class _Running(NamedTuple):
    """Statistics over some tokens of the vocabulary, each [B, W]; the mask token is left out of all but `mask`.

    Attributes:
        best: highest noisy logit.
        token: its token.
        raw: its logit without noise.
        top: token of the highest logit.
        second: highest of the other logits.
        mass: softmax statistics.
        mask: logit of the mask token.
    """

    best: Array
    token: Array
    raw: Array
    top: Array
    second: Array
    mass: _Mass
    mask: Array

    def __or__(self, later: _Running) -> _Running:
        """Statistics of both; among equals the tokens of `self` go first."""
        wins, leads = later.best > self.best, later.mass.peak > self.mass.peak
        return _Running(
            best=jnp.maximum(later.best, self.best),
            token=jnp.where(wins, later.token, self.token),
            raw=jnp.where(wins, later.raw, self.raw),
            top=jnp.where(leads, later.top, self.top),
            second=jnp.maximum(jnp.minimum(later.mass.peak, self.mass.peak), jnp.maximum(later.second, self.second)),
            mass=self.mass | later.mass,
            mask=jnp.maximum(self.mask, later.mask),
        )


def _merge_shards(mine: _Running, axis: str | None) -> _Running:
    """Statistics of the whole vocabulary from those of its shards: a few numbers a position travel, never logits."""
    if axis is None:
        return mine
    everyone = jax.lax.all_gather(mine, axis)
    parts = (jax.tree.map(lambda leaf, i=i: leaf[i], everyone) for i in range(jax.lax.axis_size(axis)))
    return functools.reduce(operator.or_, parts)


def choose(
    x_bwd: Float[Array, "B W D"],
    head_vd: Float[Array, "V D"],
    bias_v: Float[Array, " V"] | None = None,
    *,
    mask_id: int,
    scale: Float[Array, ""],
    noise: Float[Array, ""],
    keys_bw: Key[Array, "B W"],
    vocab_size: int | None = None,
    axis: str | None = None,
) -> Choice:
    """Chooses a token at each position.

    Logits are multiplied by `scale`; the choice is made after Gumbel noise times `noise` is added, in log space and
    float32. `scale=1, noise=t` is LLaDA's `exp(logits) / (-log u) ** t` with confidence at temperature 1;
    `scale=1/t, noise=1` is sampling from the softmax at temperature t with confidence from it, as Dream has it. The
    noise of a token depends on the position's key and the token alone, not on tiles or shards.

    Args:
        x_bwd: normed hidden states of the block's positions.
        head_vd: rows of the head.
        bias_v: bias of the head, if it has one.
        mask_id: token that is never chosen.
        scale: factor of the logits.
        noise: factor of the noise; 0 draws none.
        keys_bw: noise key of each position.
        vocab_size: tokens of the whole vocabulary; None: V. Rows of the head beyond it are padding.
        axis: mesh axis over which the vocabulary is split, V rows to a shard; None: it is whole.

    Returns:
        Token and confidence of each position.
    """
    num_rows = head_vd.shape[0]
    vocab_size = num_rows if vocab_size is None else vocab_size
    first = 0 if axis is None else jax.lax.axis_index(axis) * num_rows
    tile = min(TILE, num_rows)
    shape = x_bwd.shape[:2]
    lowest = float(jnp.finfo(jnp.float32).min)

    def gumbel(start: Array) -> Array:
        block, skipped = jnp.divmod(start, NOISE_BLOCK)
        blocks = block + jnp.arange(-(-tile // NOISE_BLOCK) + 1)

        def draw(key: Array) -> Array:
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(blocks)
            drawn = jax.vmap(lambda key: jax.random.gumbel(key, (NOISE_BLOCK,), jnp.float32))(keys)
            return jax.lax.dynamic_slice_in_dim(drawn.ravel(), skipped, tile)

        return jax.vmap(jax.vmap(draw))(keys_bw)

    def first_at(values: Array, highest: Array, ids: Array) -> Array:
        """Lowest token with that value; a minimum vectorizes on CPUs, where an argmax does not."""
        return jnp.min(jnp.where(values == highest[..., None], ids, vocab_size), axis=-1)

    def step(index: Array, was: _Running) -> _Running:
        begin = index * tile
        start = jnp.minimum(begin, num_rows - tile)  # the last tile overlaps the one before it
        ids = first + start + jnp.arange(tile)
        rows_td = jax.lax.dynamic_slice_in_dim(head_vd, start, tile)
        logits = jnp.einsum(
            "bwd,td->bwt", x_bwd, rows_td, precision=precision(x_bwd.dtype), preferred_element_type=jnp.float32
        )
        if bias_v is not None:
            logits += jax.lax.dynamic_slice_in_dim(bias_v, start, tile).astype(jnp.float32)
        logits *= scale
        mask_place = mask_id - first - start
        mask = jax.lax.dynamic_index_in_dim(logits, jnp.clip(mask_place, 0, tile - 1), axis=-1, keepdims=False)
        fresh = (ids >= first + begin) & (ids < vocab_size)
        allowed = jnp.where(fresh & (ids != mask_id), logits, -jnp.inf)

        peak = jnp.max(allowed, axis=-1)
        top = first_at(allowed, peak, ids)
        others = jnp.where(ids == top[..., None], -jnp.inf, allowed)
        second = jnp.max(others, axis=-1)
        below = others - jnp.maximum(peak, lowest)[..., None]  # finite bounds: 0 * -inf would be nan
        weight, below = jnp.exp(below), jnp.maximum(below, lowest)
        mass = _Mass(peak, weight.sum(-1), (weight * below).sum(-1))

        def with_noise() -> tuple[Array, Array, Array]:
            noisy = allowed + noise * gumbel(first + start)
            best = jnp.max(noisy, axis=-1)
            token = first_at(noisy, best, ids)
            place = jnp.clip(token - first - start, 0, tile - 1)
            return best, token, jnp.take_along_axis(logits, place[..., None], -1)[..., 0]

        best, token, raw = jax.lax.cond(noise > 0, with_noise, lambda: (peak, top, peak))
        here = jnp.where((mask_place >= 0) & (mask_place < tile), mask, -jnp.inf)
        return was | _Running(best, token, raw, top, second, mass, here)

    unseen, zero, nothing = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape, jnp.int32)
    start = _Running(unseen, nothing, unseen, nothing, unseen, _Mass(unseen, zero, zero), unseen)
    with jax.named_scope("head"):
        last = _merge_shards(jax.lax.fori_loop(0, -(-num_rows // tile), step, start), axis)
        mass = last.mass | _Mass(last.mask, zero, zero)
        share = jnp.exp(last.raw - mass.peak)
        certain = (last.token == last.top) & (last.raw >= mass.peak)
        first, second = last.mass.peak, jnp.maximum(last.second, last.mask)
    return Choice(
        token=last.token,
        # The sum over the others is exact where the token is the peak, and no less than 1 where it is not.
        log_odds=last.raw - mass.peak - jnp.log(jnp.where(certain, mass.over, 1 + mass.over - share)),
        margin=(jnp.exp(first - mass.peak) - jnp.exp(second - mass.peak)) / (1 + mass.over),
        entropy=jnp.log1p(mass.over) - mass.weighted / (1 + mass.over),
    )
