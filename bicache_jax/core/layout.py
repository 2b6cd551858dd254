"""From admitted rows to the arrays of a batch: suffix layout, padding and noise keys."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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


class Slots(NamedTuple):
    """The suffix layout of a canvas, numpy or jax, with any leading axes.

    Attributes:
        place: which place of the canvas, in reading order, is at each slot of the suffix.
        source: slot whose hidden state predicts each slot's token: its own, or in families that shift logits that of
            the token before it (at the start of a sequence its own, as the published loops have it).
        front: where the masked tokens begin; none where there are none.
    """

    place: Any
    source: Any
    front: Any


def suffix_slots(masked: Any, valid: Any, config: ModelConfig) -> Slots:
    """Lays out a canvas: its masked tokens first, wherever they stand, then what is known.

    So the response is a slice of every row, at the same place in all of them. In families that shift logits the token
    before the first masked one goes in front. Attention sees positions only, so the order is free. Under block-causal
    attention nothing is moved.

    Args:
        masked: which places of the canvas are to be decoded [..., U].
        valid: False for padding, which is at its end [..., U].
        config: the architecture.
    """
    xp = masked.__array_namespace__()
    place = xp.arange(masked.shape[-1])
    first = xp.argmax(masked, axis=-1)[..., None]
    if config.block_causal:
        order, front = masked * 0 + place, first
    else:
        before = (place == first - 1) & config.shift_logits
        kind = xp.where(valid, xp.where(before, 0, xp.where(masked, 1, 2)), 3)
        order, front = xp.argsort(kind, axis=-1, stable=True), xp.minimum(first, config.shifted)
    slot_of = xp.argsort(order, axis=-1, stable=True)
    source = xp.take_along_axis(slot_of, xp.maximum(order - config.shifted, 0), axis=-1)
    return Slots(order, source, front[..., 0])


def hole_of_place(request: Request) -> np.ndarray:
    """Which hole each position of a request's sequence is in, prompt and response; -1 where it is known."""
    known = len(request.prompt_ids)
    found = np.full(known + request.sampling.gen_length, -1)
    for hole, (place, length) in enumerate(request.holes or ((known, request.sampling.gen_length),)):
        found[place : place + length] = hole
    return found


def response_slots(request: Request, prefix_len: int, config: ModelConfig) -> np.ndarray:
    """Where the response stands in a suffix, in reading order; of a template all from its first hole on."""
    masked = hole_of_place(request)[prefix_len:] >= 0
    order = suffix_slots(masked, np.ones_like(masked), config).place
    return np.argsort(order)[request.lead - prefix_len :]


def in_response(rows: Rows) -> Bool[Array, "B U"]:
    """Which places of the rows' suffixes are decoded, what completes a response's last block included."""
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
    positions, hole = np.zeros((2, num_rows, length), np.int32)
    source = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1))
    valid = np.zeros((num_rows, length), bool)
    words = np.zeros((num_rows, 4), np.uint32)
    front, given, end = np.zeros((3, num_rows), np.int32)
    done = np.ones(num_rows, bool)
    for row, entry in enumerate(entries):
        if entry is None:
            continue
        request, sample, prefix_len = entry
        done[row] = False
        given[row] = given_tokens(len(request.prompt_ids), request.sampling.block_size, config)
        end[row] = decoded_tokens(given[row], request.sampling, config)
        holes = hole_of_place(request)[prefix_len:]
        completing = end[row] - given[row] - request.sampling.gen_length
        holes = np.pad(holes, (0, completing), constant_values=holes[-1])
        canvas = np.full(len(holes), config.mask_id, np.int32)
        canvas[holes < 0] = request.prompt_ids[prefix_len:]
        slots = suffix_slots(holes >= 0, np.ones(len(holes), bool), config)
        front[row] = slots.front - given[row]
        tokens[row, : len(canvas)] = canvas[slots.place]
        positions[row, : len(canvas)] = prefix_len + slots.place
        source[row, : len(canvas)] = slots.source
        hole[row, : len(canvas)] = holes[slots.place]
        valid[row, : len(canvas)] = True
        words[row] = noise_words(request.id, request.sampling.seed + sample)
    index = np.zeros(num_rows, np.int32)
    index[: len(entries)] = prefix_index[: len(entries)]
    if guided:
        half = num_rows // 2
        index[half : half + len(entries)] = prefix_index[len(entries) :]
        for values in (positions, source, hole, valid, words, front, given, end, done):
            values[half:] = values[:half]

    return {
        "tokens": tokens,
        "positions": positions,
        "source": source,
        "hole": hole,
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
    masked: Bool[Array, "B U"] | None = None,
) -> Rows:
    """Rows of canvases that are on a device already, as `lay_out` lays out requests.

    Args:
        config: the architecture.
        prefix_len: tokens of each row's prefix.
        canvas: `[rest of the prompt | response]`, then padding.
        canvas_len: tokens of each canvas.
        sampling: decoding settings.
        key: a noise key for each row, or one that is folded with the row's number.
        masked: `gen_length` places of each canvas that are decoded; None: the last ones.

    Returns:
        The rows at step 0, all over prefix 0. A row with another number of masked places has failed.
    """
    num_rows, length = canvas.shape
    rest = canvas_len - sampling.gen_length
    given = given_tokens(prefix_len + rest, sampling.block_size, config)
    end = decoded_tokens(given, sampling, config)
    canvas_len = rest - given + end
    if config.block_causal and not config.padded_prompt:  # room for what completes the last block
        length += sampling.block_size - 1
        canvas = jnp.pad(canvas, ((0, 0), (0, sampling.block_size - 1)))
    valid = jnp.arange(length) < canvas_len[:, None]
    behind = valid & (jnp.arange(length) >= rest[:, None])
    masked = behind if masked is None else masked & valid
    slots = suffix_slots(masked, valid, config)
    apart = jnp.diff(slots.place, axis=1, prepend=slots.place[:, :1]) != 1
    counter, failed = jnp.zeros(num_rows, jnp.int32), masked.sum(axis=1) != behind.sum(axis=1)
    rows = Rows(
        tokens=jnp.take_along_axis(canvas, slots.place, axis=1).astype(jnp.int32),
        positions=(prefix_len[:, None] + slots.place).astype(jnp.int32),
        source=slots.source.astype(jnp.int32),
        hole=jnp.cumsum(apart, axis=1, dtype=jnp.int32),
        valid=valid,
        front=(slots.front - given).astype(jnp.int32),
        given=given.astype(jnp.int32),
        end=(counter + end).astype(jnp.int32),
        prefix_index=counter,
        key=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_rows)) if key.ndim == 0 else key,
        step=counter,
        block=counter,
        block_step=counter,
        interval_step=counter,
        edits=counter,
        done=failed,
        forward_passes=counter,
        failed=failed,
    )
    rows = dataclasses.replace(rows, tokens=jnp.where(in_response(rows), config.mask_id, rows.tokens))
    return vary_like(rows, canvas)
