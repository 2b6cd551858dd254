"""Memory of a device from shapes alone, without a compiler: what batches are sized by."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from bicache_jax.buckets import count_bucket
from bicache_jax.config import ModelConfig

RESERVE = 0.92
"""Share of a device's memory that a plan fills at most: programs, fragments, and what the estimate may lack."""


@dataclasses.dataclass(frozen=True)
class Copies:
    """What a compiler holds besides the arrays that a program names.

    Attributes:
        mlp: activations as wide as the MLP at a time: gate and up, unless they are multiplied as they come.
        weights: copies of all parameters.
    """

    mlp: int = 2
    weights: int = 0


@dataclasses.dataclass(frozen=True)
class Room:
    """What a device offers to a plan.

    Attributes:
        nbytes: its memory.
        copies: what its compiler holds.
    """

    nbytes: int
    copies: Copies = Copies()


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a batch is decoded.

    Attributes:
        params: parameters, and copies of them.
        prefixes: shared KV and hidden states of the batch's prefixes.
        deep: KV of prefixes by row.
        suffixes: KV of a block cache.
        activations: what a refresh step holds at its peak.
    """

    params: int
    prefixes: int
    deep: int
    suffixes: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.params + self.prefixes + self.deep + self.suffixes + self.activations


def params_bytes(params: Any) -> int:
    """Bytes of the parameters on one device, from arrays or from shapes with shardings."""

    def one(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(params)))


def decode_memory(
    config: ModelConfig,
    params: int,
    *,
    groups: int,
    prefix: int,
    rows: int,
    suffix: int,
    shallow: int,
    deep: int,
    itemsize: int,
    block_cache: bool = False,
    copies: Copies = Copies(),  # noqa: B008 - immutable
) -> Memory:
    """Memory of the decode program.

    Activations are those of a refresh step at the wider of two moments: attention, which holds the residual stream and
    its norm, queries, keys and values as they are projected and as they are attended to, and what was attended; or the
    MLP. The TPU compiler's figures for LLaDA-8B and Dream-7B on four generations lie within 6 % of the total
    (`scripts/results/what_fits.md`).

    Args:
        config: one shard's part of the architecture (`bicache_jax.sharding.Layout.local`).
        params: bytes of the parameters on a device.
        groups: G.
        prefix: P.
        rows: B.
        suffix: U.
        shallow: layers of shared KV.
        deep: layers of KV by row.
        itemsize: bytes of a number.
        block_cache: whether the suffixes' KV are kept.
        copies: what the compiler holds.

    Returns:
        The estimate.
    """
    kv = 2 * config.num_kv_heads * config.head_dim * itemsize
    deep = deep if prefix else 0
    tokens = rows * (suffix + (prefix if deep else 0))
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = 2 * config.d_model + 2 * (heads + 2 * kv_heads) + heads
    mlp = 2 * config.d_model + copies.mlp * config.d_mlp
    return Memory(
        params=params * (1 + copies.weights),
        prefixes=groups * prefix * (shallow * kv + config.d_model * itemsize),
        deep=deep * rows * prefix * kv,
        suffixes=config.num_layers * rows * suffix * kv if block_cache else 0,
        activations=tokens * max(attention, mlp) * itemsize,
    )


def most_rows(limit: float, config: ModelConfig, params: int, *, per_prefix: int = 1, **shape: Any) -> int:
    """Most rows, in buckets, whose decode program fits into `limit` bytes; 0 if not even one does.

    Args:
        limit: bytes of a device that may be used.
        config: as in `decode_memory`, like the other arguments.
        params: bytes of the parameters on a device.
        per_prefix: rows that share a prefix.
        **shape: `prefix`, `suffix`, `shallow`, `deep`, `itemsize`, `block_cache`, `copies`.
    """
    found, rows = 0, 1
    while rows <= 4096:
        groups = count_bucket(-(-rows // per_prefix))
        if decode_memory(config, params, groups=groups, rows=rows, **shape).total > limit:
            break
        found, rows = rows, count_bucket(rows + 1)
    return found
