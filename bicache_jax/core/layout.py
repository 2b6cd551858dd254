"""From admitted rows to the arrays of a batch: suffix layout, padding and noise keys."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

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


def build_rows(
    entries: Sequence[tuple[Request, int, int]],
    prefix_index: Sequence[int],
    config: ModelConfig,
    *,
    num_rows: int,
    length: int,
    guided: bool = False,
) -> Rows:
    """`lay_out`, and then to the default device."""
    arrays = lay_out(entries, prefix_index, config, num_rows=num_rows, length=length, guided=guided)
    return put_rows(arrays, jnp.asarray)


def put_rows(arrays: Mapping[str, Any], put: Callable[[Any], Array]) -> Rows:
    """The rows of `lay_out` on their devices; `put` takes a field there."""
    placed = {name: put(array) for name, array in arrays.items()}  # a buffer of its own for each: they are donated
    return Rows(**placed | {"key": _keys(placed["key"])})


def lay_out(
    entries: Sequence[tuple[Request, int, int]],
    prefix_index: Sequence[int],
    config: ModelConfig,
    *,
    num_rows: int,
    length: int,
    guided: bool = False,
) -> dict[str, np.ndarray]:
    """Lays out a batch on the host.

    Args:
        entries: (request, sample, prefix_len) of each row.
        prefix_index: prefix of each row, then of each row's twin where there are any.
        config: the architecture.
        num_rows: B, twins included; rows beyond the entries are padding and complete from the start.
        length: U, at least every row's suffix.
        guided: whether the second half of the rows are twins of the first (`bicache_jax.core.cache.Rows`).

    Returns:
        The fields of the rows at step 0, their keys as words.
    """
    front = int(config.shift_logits)
    tokens = np.full((num_rows, length), config.mask_id, np.int32)
    positions = np.zeros((num_rows, length), np.int32)
    valid = np.zeros((num_rows, length), bool)
    words = np.zeros((num_rows, 4), np.uint32)
    for place, (request, sample, prefix_len) in enumerate(entries):
        prompt, gen_length = request.prompt_ids, request.sampling.gen_length
        split = len(prompt) - front  # families that shift logits keep the last prompt token before the response
        rest = prompt[prefix_len:split]
        size = front + gen_length + len(rest)
        tokens[place, :front] = prompt[split:]
        tokens[place, front + gen_length : size] = rest
        positions[place, : front + gen_length] = split + np.arange(front + gen_length)
        positions[place, front + gen_length : size] = prefix_len + np.arange(len(rest))
        valid[place, :size] = True
        words[place] = noise_words(request.id, request.sampling.seed + sample)
    done = np.arange(num_rows) >= len(entries)
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
        **{name: np.zeros(num_rows, np.int32) for name in ("step", "block", "block_step", "forward_passes")},
        "done": done,
    }
