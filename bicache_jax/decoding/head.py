"""The LM head in vocabulary tiles: float32 logits exist for one tile of the vocabulary at a time.

Each tile is reduced to a few running statistics and then dropped. Statistics of two sets of tokens merge with `|`.
Confidence is ranked by the log-odds of the chosen token, `log p - log(1 - p)`: monotone in the softmax probability p,
but without saturation where p rounds to 1.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from bicache_jax.core.axes import vary_like
from bicache_jax.core.cache import Draw
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.quantized import product
from bicache_jax.decoding.filters import floors, in_chunks

TILE = 2048
NOISE_BLOCK = 128
"""Noise is drawn for this many tokens from one key, independent of tiles and shards."""
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Choice(NamedTuple):
    """The token chosen at each position.

    Attributes:
        token: argmax of the (noisy) logits without the mask token; the lowest id among equals.
        log_odds: log-odds of its softmax probability without noise, with the mask token in the sum; NaN if a logit is
            not finite.
        margin: probability of the most probable token minus that of the second.
        entropy: entropy of the softmax, in nats.
    """

    token: Int[Array, "B W"]
    log_odds: Float[Array, "B W"]
    margin: Float[Array, "B W"]
    entropy: Float[Array, "B W"]


class _Mass(NamedTuple):
    """Softmax statistics of some logits, relative to the highest of them, each [B, W].

    The sums exclude the highest logit, so that small terms stay exact when that token is almost certain.

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
            count = part.over + ~is_top  # the lower peak becomes one of the others
            over += factor * count
            weighted += factor * (part.weighted + count * shift)
        return _Mass(peak, over, weighted)


class _Running(NamedTuple):
    """Statistics of some of the tokens, each [B, W]; the mask token only counts in `mask`.

    Attributes:
        best: highest noisy logit.
        token: its token.
        raw: its logit without noise.
        top: token of the highest logit.
        second: highest of the other logits.
        mass: softmax statistics.
        mask: logit of the mask token, -inf if it is not among the tokens.
    """

    best: Array
    token: Array
    raw: Array
    top: Array
    second: Array
    mass: _Mass
    mask: Array

    @classmethod
    def of_nothing(cls, shape: tuple[int, ...]) -> _Running:
        """Statistics of an empty set of tokens."""
        unseen, zero, nothing = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape, jnp.int32)
        return cls(unseen, nothing, unseen, nothing, unseen, _Mass(unseen, zero, zero), unseen)

    def __or__(self, other: _Running) -> _Running:
        """Statistics of both sets of tokens; `self` must hold the lower ids and wins ties."""
        wins = other.best > self.best
        return _Running(
            best=jnp.maximum(self.best, other.best),
            token=jnp.where(wins, other.token, self.token),
            raw=jnp.where(wins, other.raw, self.raw),
            top=jnp.where(other.mass.peak > self.mass.peak, other.top, self.top),
            second=jnp.maximum(jnp.minimum(self.mass.peak, other.mass.peak), jnp.maximum(self.second, other.second)),
            mass=self.mass | other.mass,
            mask=jnp.maximum(self.mask, other.mask),
        )

    def choice(self, deferred: Bool[Array, "B W"]) -> Choice:
        """The choice from statistics of the whole vocabulary; `deferred` tokens get no confidence."""
        zero = jnp.zeros_like(self.best)
        mass = self.mass | _Mass(self.mask, zero, zero)
        share = jnp.exp(self.raw - mass.peak)
        certain = (self.token == self.top) & (self.raw >= mass.peak)
        first, second = self.mass.peak, jnp.maximum(self.second, self.mask)
        # The sum over the others is exact if the token is the peak, and at least 1 if it is not.
        log_odds = self.raw - mass.peak - jnp.log(jnp.where(certain, mass.over, 1 + mass.over - share))
        margin = (jnp.exp(first - mass.peak) - jnp.exp(second - mass.peak)) / (1 + mass.over)
        return Choice(
            token=self.token,
            log_odds=jnp.where(deferred, _LOWEST, log_odds),
            margin=jnp.where(deferred, -1, margin),
            entropy=jnp.where(deferred, -_LOWEST, jnp.log1p(mass.over) - mass.weighted / (1 + mass.over)),
        )


def _merge_shards(mine: _Running, axis: str | None) -> _Running:
    """Merges the shards' statistics: only a few numbers per position are exchanged, never logits."""
    if axis is None:
        return mine
    everyone = jax.lax.all_gather(mine, axis)
    parts = (jax.tree.map(lambda leaf, i=i: leaf[i], everyone) for i in range(jax.lax.axis_size(axis)))
    return functools.reduce(operator.or_, parts)


def guide(
    with_bwd: Float[Array, "B W D"], without_bwd: Float[Array, "B W D"], guidance: Float[Array, ""]
) -> Float[Array, "B W D"]:
    """Classifier-free guidance, applied to the input of the head.

    The head is linear, so `u + (w + 1) * (c - u)` of normalised hidden states gives the same combination of their
    logits, biases included, and the head runs once.

    Args:
        with_bwd: normalised hidden states of the rows.
        without_bwd: those of their twins, which have a masked prompt.
        guidance: w + 1.

    Returns:
        Hidden states that give guided logits.
    """
    without = without_bwd.astype(jnp.float32)
    return (without + guidance * (with_bwd.astype(jnp.float32) - without)).astype(with_bwd.dtype)


def _among(ids: Int[Array, "..."], tokens: tuple[int, ...]) -> Bool[Array, "..."]:
    found = jnp.zeros(ids.shape, bool)
    for token in tokens:
        found |= ids == token
    return found


def choose(
    x_bwd: Float[Array, "B W D"],
    head_vd: Shaped[Array, "V D"],
    bias_v: Float[Array, " V"] | None = None,
    scale_v: Float[Array, " V"] | None = None,
    *,
    config: ModelConfig,
    draw: Draw,
    keys_bw: Key[Array, "B W"],
    axis: str | None = None,
) -> Choice:
    """Chooses a token at each position.

    Logits are multiplied by `draw.scale`. Gumbel noise times `draw.noise` is added, in log space and float32, before
    the choice. `scale=1, noise=t` is LLaDA's `exp(logits) / (-log u) ** t` with confidence at temperature 1.
    `scale=1/t, noise=1` samples from the softmax at temperature t and takes the confidence from it, as Dream does. The
    noise of a token depends only on the position's key and the token, not on tiles or shards.

    Tokens that a filter drops, and end-of-text tokens if they are banned, count for neither choice nor confidence. End
    tokens without confidence (`draw.defer_eos`) can be chosen, but are excluded from the sums of the other tokens.

    Args:
        x_bwd: normalised hidden states of the block's positions.
        head_vd: rows of the head; those beyond the vocabulary are padding.
        bias_v: bias of the head, if it has one.
        scale_v: scales of its rows, if these are in 8 bits.
        config: the architecture, which defines the mask token (never chosen) and the end tokens (static).
        draw: how tokens are drawn.
        keys_bw: noise key of each position.
        axis: mesh axis over which the vocabulary is split, V rows per shard; None: it is not split.

    Returns:
        Token and confidence of each position.
    """
    num_rows, vocab_size, mask_id = head_vd.shape[0], config.vocab_size, config.mask_id
    first = 0 if axis is None else jax.lax.axis_index(axis) * num_rows
    tile, shape = min(TILE, num_rows), x_bwd.shape[:2]
    ends = tuple(token for token in config.eos_ids if token not in config.eot_ids)

    def scaled_logits(x: Float[Array, "*P D"], start: Array, size: int) -> Float[Array, "*P T"]:
        rows_td = jax.lax.dynamic_slice_in_dim(head_vd, start, size)
        scale_t = None if scale_v is None else jax.lax.dynamic_slice_in_dim(scale_v, start, size)
        logits = product(x, rows_td, scale_t, out_first=True, quantize=config.quantize, dtype=jnp.float32)
        if bias_v is not None:
            logits += jax.lax.dynamic_slice_in_dim(bias_v, start, size).astype(jnp.float32)
        return logits * draw.scale

    def may_be_chosen(ids: Int[Array, " T"]) -> Bool[Array, " T"]:
        allowed = (ids != mask_id) & (ids < vocab_size) & ~(draw.ban_eos & _among(ids, ends))
        return allowed & ~jnp.any(ids[:, None] == draw.suppressed, axis=-1)

    def floors_of(x_cd: Float[Array, "C D"]) -> Float[Array, " C"]:
        logits = scaled_logits(x_cd, jnp.asarray(0), num_rows)
        # A logit that is not finite stops its row, see below. Here it must not keep the search from ending.
        usable = may_be_chosen(first + jnp.arange(num_rows)) & jnp.isfinite(logits)
        logits = jnp.where(usable, logits, -jnp.inf)
        sharpness = 1 / jnp.where(draw.noise > 0, draw.noise, 1)
        return floors(logits, sharpness=sharpness, top_p=draw.top_p, top_k=draw.top_k, axis=axis)

    def gumbel(start: Array) -> Array:
        block, skipped = jnp.divmod(start, NOISE_BLOCK)
        blocks = block + jnp.arange(-(-tile // NOISE_BLOCK) + 1)

        def one(key: Array) -> Array:
            keys = jax.vmap(functools.partial(jax.random.fold_in, key))(blocks)
            drawn = jax.vmap(lambda key: jax.random.gumbel(key, (NOISE_BLOCK,), jnp.float32))(keys)
            return jax.lax.dynamic_slice_in_dim(drawn.ravel(), skipped, tile)

        return jax.vmap(jax.vmap(one))(keys_bw)

    def first_at(values: Array, highest: Array, ids: Array) -> Array:
        """Lowest token with that value; on CPUs a minimum vectorizes and an argmax does not."""
        return jnp.min(jnp.where(values == highest[..., None], ids, vocab_size), axis=-1)

    def of_tile(index: Array, floor_bw: Array) -> _Running:
        begin = index * tile
        start = jnp.minimum(begin, num_rows - tile)  # the last tile overlaps the one before it
        ids = first + start + jnp.arange(tile)
        logits = scaled_logits(x_bwd, start, tile)
        mask_index = mask_id - first - start
        mask = jax.lax.dynamic_index_in_dim(logits, jnp.clip(mask_index, 0, tile - 1), axis=-1, keepdims=False)
        # The comparisons are negated so that the filters keep NaN and it reaches the statistics.
        has_mask = (mask_index >= 0) & (mask_index < tile) & ~(mask < floor_bw)
        choosable = (ids >= first + begin) & may_be_chosen(ids) & ~(logits < floor_bw[..., None])
        allowed = jnp.where(choosable & ~(draw.defer_eos & _among(ids, config.eos_ids)), logits, -jnp.inf)

        peak = jnp.max(allowed, axis=-1)
        top = first_at(allowed, peak, ids)
        others = jnp.where(ids == top[..., None], -jnp.inf, allowed)
        second = jnp.max(others, axis=-1)
        below = others - jnp.maximum(peak, _LOWEST)[..., None]  # finite bounds: 0 * -inf would be nan
        weight, below = jnp.exp(below), jnp.maximum(below, _LOWEST)
        mass = _Mass(peak, weight.sum(-1), (weight * below).sum(-1))

        def drawn() -> tuple[Array, Array, Array]:
            noisy = jnp.where(choosable, logits, -jnp.inf) + draw.noise * gumbel(first + start)
            best = jnp.max(noisy, axis=-1)
            token = first_at(noisy, best, ids)
            index = jnp.clip(token - first - start, 0, tile - 1)
            return best, token, jnp.take_along_axis(logits, index[..., None], -1)[..., 0]

        best, token, raw = jax.lax.cond((draw.noise > 0) | draw.defer_eos, drawn, lambda: (peak, top, peak))
        return _Running(best, token, raw, top, second, mass, jnp.where(has_mask, mask, -jnp.inf))

    with jax.named_scope("filters"):
        floor_bw = jax.lax.cond(
            (draw.top_p < 1) | (draw.top_k < vocab_size),
            lambda: in_chunks(floors_of, x_bwd, num_rows),
            lambda: vary_like(jnp.full(shape, -jnp.inf), x_bwd),
        )
    with jax.named_scope("head"):
        mine = jax.lax.fori_loop(
            0,
            -(-num_rows // tile),
            lambda index, was: was | of_tile(index, floor_bw),
            vary_like(_Running.of_nothing(shape), x_bwd),
        )
        found = _merge_shards(mine, axis)
        return found.choice(draw.defer_eos & _among(found.token, config.eos_ids))
