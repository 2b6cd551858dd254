"""From admitted rows to the arrays of a batch: suffix layout, padding and noise keys."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt32

from bicache_jax.core.axes import vary_like
from bicache_jax.core.cache import Rows
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.types import Request


def suffix_length(request: Request, prefix_len: int) -> int:
    """U: the rest of the prompt and the response."""
    return len(request.prompt_ids) - prefix_len + request.sampling.gen_length


def noise_words(request_id: str, seed: int) -> tuple[int, int, int, int]:
    """What a row's noise key is made of: the seed in two words, a hash of the request's name in two."""
    digest = hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (
        seed & 0xFFFFFFFF,
        (seed >> 32) & 0xFFFFFFFF,
        int.from_bytes(digest[:4], "little"),
        int.from_bytes(digest[4:], "little"),
    )


@jax.jit
def _keys(words_bw: UInt32[Array, "B 4"]) -> Key[Array, " B"]:
    def fold(words: Array) -> Array:
        return functools.reduce(jax.random.fold_in, list(words[1:]), jax.random.key(words[0]))

    return jax.vmap(fold)(words_bw)


def reading_order(slot: Any, canvas_len: Any, gen_length: int, config: ModelConfig) -> Any:
    """The suffix layout: which token of a canvas in reading order is at a slot of the suffix.

    The response comes first, so that it is a static slice of every row; in families that shift logits, after the last
    prompt token. Attention sees positions only, so the order is free.

    Args:
        slot: places in the suffix, numpy or jax.
        canvas_len: tokens of the canvas `[rest of the prompt | response]`.
        gen_length: tokens of its response.
        config: the architecture.

    Returns:
        Places in the canvas, for slots below `canvas_len`.
    """
    front = config.shifted + gen_length
    in_front = slot < front
    return slot + in_front * (canvas_len - front) + (in_front - 1) * front


def response_slots(config: ModelConfig, gen_length: int) -> slice:
    """Where the response stands in a suffix."""
    return slice(config.shifted, config.shifted + gen_length)


def in_response(slot: Any, config: ModelConfig, gen_length: Any) -> Any:
    """Whether places in the suffix, an array of any shape, are the response's; `gen_length` may be traced."""
    return (slot >= config.shifted) & (slot < config.shifted + gen_length)


def put_rows(arrays: Mapping[str, Any], put: Callable[[Any], Array]) -> Rows:
    """The rows of `lay_out` on their devices; `put` takes a field there."""
    placed = {name: put(array) for name, array in arrays.items()}  # a separate buffer for each: they are donated
    return Rows(**placed | {"key": _keys(placed["key"])})


def lay_out(
    entries: Sequence[tuple[Request, int, int] | None],
    prefix_index: Sequence[int],
    config: ModelConfig,
    *,
    num_rows: int,
    length: int,
    guided: bool = False,
) -> dict[str, np.ndarray]:
    """Lays out a batch on the host.

    Args:
        entries: (request, sample, prefix_len) of each row; None for padding.
        prefix_index: prefix of each row, then of each row's twin where there are any.
        config: the architecture.
        num_rows: B, twins included; rows beyond the entries are padding and complete from the start.
        length: U, at least every row's suffix.
        guided: whether the second half of the rows are twins of the first (`bicache_jax.core.cache.Rows`).

    Returns:
        The fields of the rows at step 0, their keys as words.
    """
    tokens = np.full((num_rows, length), config.mask_id, np.int32)
    positions = np.zeros((num_rows, length), np.int32)
    valid = np.zeros((num_rows, length), bool)
    words = np.zeros((num_rows, 4), np.uint32)
    done = np.ones(num_rows, bool)
    for row, entry in enumerate(entries):
        if entry is None:
            continue
        request, sample, prefix_len = entry
        done[row] = False
        gen_length, prompt = request.sampling.gen_length, np.asarray(request.prompt_ids[prefix_len:], np.int32)
        canvas = np.concatenate([prompt, np.full(gen_length, config.mask_id, np.int32)])
        order = reading_order(np.arange(len(canvas)), len(canvas), gen_length, config)
        tokens[row, : len(canvas)] = canvas[order]
        positions[row, : len(canvas)] = prefix_len + order
        valid[row, : len(canvas)] = True
        words[row] = noise_words(request.id, request.sampling.seed + sample)
    index = np.zeros(num_rows, np.int32)
    index[: len(entries)] = prefix_index[: len(entries)]
    if guided:
        half = num_rows // 2
        index[half : half + len(entries)] = prefix_index[len(entries) :]
        for values in (positions, valid, words, done):
            values[half:] = values[:half]

    return {
        "tokens": tokens,
        "positions": positions,
        "valid": valid,
        "prefix_index": index,
        "key": words,
        **{
            name: np.zeros(num_rows, np.int32)
            for name in ("step", "block", "block_step", "interval_step", "forward_passes")
        },
        "done": done,
        "failed": np.zeros(num_rows, bool),
    }


def lay_out_canvases(
    config: ModelConfig,
    prefix_len: Int[Array, " B"],
    canvas: Int[Array, "B U"],
    canvas_len: Int[Array, " B"],
    gen_length: int,
    key: Key[Array, "*B"],
) -> Rows:
    """Rows of canvases that are on a device already, as `lay_out` lays out requests.

    Args:
        config: the architecture.
        prefix_len: tokens of each row's prefix.
        canvas: `[rest of the prompt | response]`, then padding.
        canvas_len: tokens of each canvas.
        gen_length: tokens of the response.
        key: a noise key for each row, or one that is folded with the row's number.

    Returns:
        The rows at step 0, all over prefix 0.
    """
    num_rows, length = canvas.shape
    slot = jnp.arange(length)
    order = reading_order(slot, canvas_len[:, None], gen_length, config)
    valid = slot < canvas_len[:, None]
    order = jnp.where(valid, order, slot)
    response = in_response(slot, config, gen_length)
    counter = jnp.zeros(num_rows, jnp.int32)
    rows = Rows(
        tokens=jnp.where(response, config.mask_id, jnp.take_along_axis(canvas, order, axis=1)).astype(jnp.int32),
        positions=(prefix_len[:, None] + order).astype(jnp.int32),
        valid=valid,
        prefix_index=counter,
        key=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_rows)) if key.ndim == 0 else key,
        step=counter,
        block=counter,
        block_step=counter,
        interval_step=counter,
        done=jnp.zeros(num_rows, bool),
        forward_passes=counter,
        failed=jnp.zeros(num_rows, bool),
    )
    return vary_like(rows, canvas)
