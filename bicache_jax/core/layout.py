"""From admitted rows to the arrays of a batch: suffix layout, padding and noise keys."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, UInt32

from bicache_jax.core.axes import vary_like
from bicache_jax.core.cache import Rows
from bicache_jax.core.config import ModelConfig, SamplingConfig
from bicache_jax.core.types import Request


def suffix_length(request: Request, prefix_len: int) -> int:
    """U: the rest of the prompt and the response."""
    return len(request.prompt_ids) - prefix_len + request.sampling.gen_length


def given_tokens(prompt_len: Any, block: int, config: ModelConfig) -> Any:
    """Tokens of the prompt in the response's first block, where blocks are counted from the start of the prompt."""
    return prompt_len % block if config.block_causal and not config.padded_prompt else prompt_len * 0


def decoded_tokens(given: Any, sampling: SamplingConfig, config: ModelConfig) -> Any:
    """Tokens of the response's blocks: what is given in the first, the response, and what completes the last one."""
    tokens, block = given + sampling.gen_length, sampling.block_size
    return -(-tokens // block) * block if config.block_causal and not config.padded_prompt else tokens


def whole_blocks(prefix_len: int, prompt_len: int, block: int, config: ModelConfig) -> int:
    """The longest part of a prefix that later tokens do not change, and that ends in front of a suffix.

    Under full attention that is the prefix itself. Under block-causal attention it ends with a block.

    Args:
        prefix_len: tokens of the prefix.
        prompt_len: tokens of the prompt.
        block: tokens of a block.
        config: the architecture.
    """
    if not config.block_causal:
        return prefix_len
    most = min(prefix_len, prompt_len - config.shifted)
    first = prompt_len % block if config.padded_prompt else 0
    return max(0, most - (most - first) % block) if most >= first else 0


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
    prompt token. Attention sees positions only, so the order is free. Under block-causal attention nothing is moved.

    Args:
        slot: places in the suffix, numpy or jax.
        canvas_len: tokens of the canvas `[rest of the prompt | response]`.
        gen_length: tokens of its response.
        config: the architecture.

    Returns:
        Places in the canvas, for slots below `canvas_len`.
    """
    if config.block_causal:
        return slot + canvas_len * 0
    front = config.shifted + gen_length
    in_front = slot < front
    return slot + in_front * (canvas_len - front) + (in_front - 1) * front


def response_slots(request: Request, prefix_len: int, config: ModelConfig) -> slice:
    """Where the response stands in a suffix."""
    start = len(request.prompt_ids) - prefix_len if config.block_causal else config.shifted
    return slice(start, start + request.sampling.gen_length)


def in_response(rows: Rows) -> Bool[Array, "B U"]:
    """Which places of the rows' suffixes are the response's, what completes its last block included."""
    slot = jnp.arange(rows.tokens.shape[1]) - rows.front[:, None]
    return (slot >= rows.given[:, None]) & (slot < rows.end[:, None])


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
    front, given, end = np.zeros((3, num_rows), np.int32)
    done = np.ones(num_rows, bool)
    for row, entry in enumerate(entries):
        if entry is None:
            continue
        request, sample, prefix_len = entry
        done[row] = False
        prompt = np.asarray(request.prompt_ids[prefix_len:], np.int32)
        given[row] = given_tokens(len(request.prompt_ids), request.sampling.block_size, config)
        end[row] = decoded_tokens(given[row], request.sampling, config)
        front[row] = len(prompt) - given[row] if config.block_causal else config.shifted
        canvas = np.concatenate([prompt, np.full(end[row] - given[row], config.mask_id, np.int32)])
        order = reading_order(np.arange(len(canvas)), len(canvas), request.sampling.gen_length, config)
        tokens[row, : len(canvas)] = canvas[order]
        positions[row, : len(canvas)] = prefix_len + order
        valid[row, : len(canvas)] = True
        words[row] = noise_words(request.id, request.sampling.seed + sample)
    index = np.zeros(num_rows, np.int32)
    index[: len(entries)] = prefix_index[: len(entries)]
    if guided:
        half = num_rows // 2
        index[half : half + len(entries)] = prefix_index[len(entries) :]
        for values in (positions, valid, words, front, given, end, done):
            values[half:] = values[:half]

    return {
        "tokens": tokens,
        "positions": positions,
        "valid": valid,
        "front": front,
        "given": given,
        "end": end,
        "prefix_index": index,
        "key": words,
        **{
            name: np.zeros(num_rows, np.int32)
            for name in ("step", "block", "block_step", "interval_step", "edits", "forward_passes")
        },
        "done": done,
        "failed": np.zeros(num_rows, bool),
    }


def lay_out_canvases(
    config: ModelConfig,
    prefix_len: Int[Array, " B"],
    canvas: Int[Array, "B U"],
    canvas_len: Int[Array, " B"],
    sampling: SamplingConfig,
    key: Key[Array, "*B"],
) -> Rows:
    """Rows of canvases that are on a device already, as `lay_out` lays out requests.

    Args:
        config: the architecture.
        prefix_len: tokens of each row's prefix.
        canvas: `[rest of the prompt | response]`, then padding.
        canvas_len: tokens of each canvas.
        sampling: decoding settings.
        key: a noise key for each row, or one that is folded with the row's number.

    Returns:
        The rows at step 0, all over prefix 0.
    """
    num_rows, length = canvas.shape
    rest = canvas_len - sampling.gen_length
    given = given_tokens(prefix_len + rest, sampling.block_size, config)
    end = decoded_tokens(given, sampling, config)
    canvas_len = rest - given + end
    if config.block_causal and not config.padded_prompt:  # room for what completes the last block
        length += sampling.block_size - 1
        canvas = jnp.pad(canvas, ((0, 0), (0, sampling.block_size - 1)))
    slot = jnp.arange(length)
    order = reading_order(slot, canvas_len[:, None], sampling.gen_length, config)
    valid = slot < canvas_len[:, None]
    order = jnp.where(valid, order, slot)
    counter = jnp.zeros(num_rows, jnp.int32)
    rows = Rows(
        tokens=jnp.take_along_axis(canvas, order, axis=1).astype(jnp.int32),
        positions=(prefix_len[:, None] + order).astype(jnp.int32),
        valid=valid,
        front=(rest - given if config.block_causal else counter + config.shifted).astype(jnp.int32),
        given=given.astype(jnp.int32),
        end=(counter + end).astype(jnp.int32),
        prefix_index=counter,
        key=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_rows)) if key.ndim == 0 else key,
        step=counter,
        block=counter,
        block_step=counter,
        interval_step=counter,
        edits=counter,
        done=jnp.zeros(num_rows, bool),
        forward_passes=counter,
        failed=jnp.zeros(num_rows, bool),
    )
    rows = dataclasses.replace(rows, tokens=jnp.where(in_response(rows), config.mask_id, rows.tokens))
    return vary_like(rows, canvas)
