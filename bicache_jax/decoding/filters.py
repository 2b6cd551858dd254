"""Top-k and nucleus (top-p, arXiv 1904.09751) filters: the only code that needs whole distributions.

A filter is a *floor* per position: tokens with lower logits are dropped. Positions are processed in chunks, so that
float32 logits of the whole vocabulary exist for only a few positions at a time. The floor is found by bisection on the
logits: every step needs only sums and counts over the vocabulary, which can also be added over its shards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bicache_jax.core.axes import vary_like
from bicache_jax.core.numerics import psum

LOGITS = 1 << 22  # float32 logits held at a time: 16 MiB
_LOWEST = float(jnp.finfo(jnp.float32).min)


def _order(values: Float[Array, "..."]) -> Int[Array, "..."]:
    """Maps floats to integers in the same order, adjacent floats to adjacent integers; its own inverse on the bits."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _value(order: Int[Array, "..."]) -> Float[Array, "..."]:
    bits = jnp.where(order < 0, order ^ jnp.int32(0x7FFFFFFF), order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def floors(
    logits_cv: Float[Array, "C V"],
    *,
    sharpness: Float[Array, ""],
    top_p: Float[Array, ""],
    top_k: Int[Array, ""],
    axis: str | None = None,
) -> Float[Array, " C"]:
    """Lowest logit that each position keeps, or a little less.

    A token is kept if fewer than `top_k` tokens have a higher logit and if those tokens hold no more than `top_p` of
    the softmax. So the most probable token is always kept, and also the one with which the nucleus exceeds `top_p`
    (Dream's `top_p_logits` and `top_k_logits`). Tokens with equal logits are all kept or all dropped.

    Args:
        logits_cv: scaled logits; -inf for tokens that are already excluded.
        sharpness: factor of the logits in the softmax that `top_p` refers to.
        top_p: share of the probability; 1 keeps all.
        top_k: number of tokens; V or more keeps all.
        axis: mesh axis over which the vocabulary is split; None: it is not split.

    Returns:
        A value between the lowest kept logit and the highest dropped one.
    """
    total = functools.partial(psum, axis=axis)
    peak = jnp.max(logits_cv, axis=-1)
    peak = peak if axis is None else jax.lax.pmax(peak, axis)
    weight = jnp.exp((logits_cv - peak[:, None]) * sharpness)
    everything = total(jnp.sum(weight, axis=-1))
    valid = total(jnp.sum(logits_cv > _LOWEST, axis=-1))

    # `low` is dropped or below everything, `high` is kept. A position is done if no logit is between them.
    low, high = vary_like(jnp.full(peak.shape, _order(jnp.float32(_LOWEST))), peak), _order(peak)
    from_high = total(jnp.sum(logits_cv >= peak[:, None], axis=-1))

    def halve(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        low, high, above_low, from_high = carry
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        value = _value(middle)[:, None]
        above = total(jnp.sum(logits_cv > value, axis=-1))
        share = total(jnp.sum(jnp.where(logits_cv > value, weight, 0), axis=-1))
        reaching = total(jnp.sum(logits_cv >= value, axis=-1))
        kept = ((share <= top_p * everything) | (top_p >= 1)) & (above < top_k)
        open_ = above_low > from_high  # a position that is done does not change while others go on
        return (
            jnp.where(open_ & ~kept, middle, low),
            jnp.where(open_ & kept, middle, high),
            jnp.where(open_ & ~kept, above, above_low),
            jnp.where(open_ & kept, reaching, from_high),
        )

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        _, _, above_low, from_high = carry
        return jnp.any(above_low > from_high)

    low, high, _, _ = jax.lax.while_loop(unfinished, halve, (low, high, valid, from_high))
    below, kept = _value(low), _value(high)
    between = below / 2 + kept / 2
    return jnp.where(between > below, between, kept)


def in_chunks(
    function: Callable[[Float[Array, "C D"]], Float[Array, " C"]], x_bwd: Float[Array, "B W D"], vocab_size: int
) -> Float[Array, "B W"]:
    """Applies a function of whole distributions to all positions, at most `LOGITS` logits at a time."""
    num_rows, width, size = x_bwd.shape
    positions = num_rows * width
    chunk = max(1, min(positions, LOGITS // vocab_size))
    count = -(-positions // chunk)
    x_pd = jnp.pad(x_bwd.reshape(positions, size), ((0, count * chunk - positions), (0, 0)))
    found = jax.lax.map(function, x_pd.reshape(count, chunk, size))
    return found.reshape(-1)[:positions].reshape(num_rows, width)
