"""Sums and maxima over the vocabulary, whose logits exist for one tile of it at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from bicache_jax.core.axes import vary_like
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.quantized import product
from bicache_jax.decoding.head import TILE

State = TypeVar("State")
Head = tuple[Shaped[Array, "V D"], Float[Array, " V"] | None, Float[Array, " V"] | None]
"""Rows of the head, their biases and scales, as `Backbone.head` gives them."""


def over_tiles(
    fold: Callable[[Array, tuple[Array, ...], State], State],
    start: State,
    hidden: Sequence[Float[Array, "B W D"]],
    head: Head,
    *,
    config: ModelConfig,
    axis: str | None = None,
) -> State:
    """Folds the logits of some hidden states, tile by tile; on a mesh those of this shard's part of the vocabulary.

    Args:
        fold: takes the tokens of a tile [T], the logits of each of `hidden` [B, W, T] and what was found before. Logits
            that do not count are -inf: padding of the vocabulary, and what an earlier tile has shown.
        start: what is found in no tile; a pytree.
        hidden: normalised hidden states.
        head: the head.
        config: the architecture.
        axis: mesh axis over which the vocabulary is split; None: it is not.

    Returns:
        What is found in all tiles.
    """
    head_vd, bias_v, scale_v = head
    num_rows = head_vd.shape[0]
    tile = min(TILE, num_rows)
    first = 0 if axis is None else jax.lax.axis_index(axis) * num_rows

    def logits(x_bwd: Array, start: Array) -> Array:
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=tile)
        scale = None if scale_v is None else part(scale_v)
        found = product(x_bwd, part(head_vd), scale, out_first=True, quantize=config.quantize, dtype=jnp.float32)
        return found if bias_v is None else found + part(bias_v).astype(jnp.float32)

    def of_tile(index: Array, was: State) -> State:
        begin = jnp.minimum(index * tile, num_rows - tile)  # the last tile overlaps the one before it
        rows = begin + jnp.arange(tile)
        ids = first + rows
        counts = (rows >= index * tile) & (ids < config.vocab_size)
        return fold(ids, tuple(jnp.where(counts, logits(x_bwd, begin), -jnp.inf) for x_bwd in hidden), was)

    return jax.lax.fori_loop(0, -(-num_rows // tile), of_tile, vary_like(start, hidden[0]))
