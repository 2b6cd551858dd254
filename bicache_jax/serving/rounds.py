"""Rounds: the batches that run at the same time, one on every data shard. Pure functions of the host.

A round is one call of one program, so its batches agree in shapes; boundary, settings and prefixes are each shard's.
Every host of a job computes the same rounds from the same requests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from bicache_jax.core.buckets import count_bucket, prefix_bucket, suffix_bucket
from bicache_jax.core.config import CacheConfig, ModelConfig
from bicache_jax.serving.balance import Group, pack
from bicache_jax.serving.flops import encode_flops, jobs, row_flops
from bicache_jax.serving.grouping import Batch, Program, Row, plan_batches

Round = tuple[Batch, ...]
IDLE = Batch(rows=(), prefixes=((),), prefix_index=(), boundary=0)
"""What a shard without work runs: nothing but the padding of `round_shape`."""


def round_shape(batches: Sequence[Batch], *, growing: bool = False) -> tuple[int, int, int, int]:
    """(G, P, B, U) in buckets that hold each of the batches; `growing`: those of a conversation.

    This is what all shards of a round are padded to: prefixes with empty ones, rows with rows that are complete from
    the start, tokens with invalid ones. Twins of guidance are rows.
    """
    longest = max(len(prefix) for batch in batches for prefix in batch.prefixes)
    prefix = prefix_bucket(longest, growing=growing)
    suffix = suffix_bucket(max(row.suffix_len for batch in batches for row in batch.rows), growing=growing)
    groups = max(count_bucket(len(batch.prefixes)) for batch in batches)
    num_rows = max(count_bucket(len(batch.rows)) for batch in batches)
    return groups, prefix, num_rows * (1 + any(batch.guided for batch in batches)), suffix


def row_costs(config: ModelConfig, cache: CacheConfig, rows: Sequence[Row]) -> list[float]:
    """Operations of each row, without the encoding of its prefix."""
    return [row_flops(config, dataclasses.replace(job, rows_per_prefix=math.inf)) for job in jobs(rows, cache)]


def divide(config: ModelConfig, cache: CacheConfig, items: Sequence[Sequence[Row]], parts: int) -> list[int]:
    """Divides work into parts of equal cost, that of one prefix together as far as equal parts allow.

    Args:
        config: the architecture.
        cache: how prefixes are reused.
        items: what stays together, each some rows of one prefix: such as the samples of a request.
        parts: data shards, workers or slices.

    Returns:
        The part of each item.
    """
    costs = iter(row_costs(config, cache, [row for item in items for row in item]))
    of_item = [sum(next(costs) for _ in item) for item in items]
    members: dict[tuple[int, ...], list[int]] = {}
    for number, item in enumerate(items):  # without a prefix nothing is shared
        members.setdefault(item[0].prefix or (-1 - number,), []).append(number)
    groups = [
        Group(
            setup=max(float(encode_flops(config, row.prefix_len, row.boundary)) for n in numbers for row in items[n]),
            costs=tuple(of_item[n] for n in numbers),
        )
        for numbers in members.values()
    ]
    found = [0] * len(items)
    for numbers, assigned in zip(members.values(), pack(groups, parts), strict=True):
        for number, part in zip(numbers, assigned, strict=True):
            found[number] = part
    return found


def share_out(config: ModelConfig, cache: CacheConfig, rows: Sequence[Row], shards: int) -> list[list[Row]]:
    """The rows of each data shard, those of one prefix together as far as shares allow."""
    if shards == 1:
        return [list(rows)]
    ordered = sorted(rows, key=lambda row: (row.prefix, row.request.index))
    shares: list[list[Row]] = [[] for _ in range(shards)]
    for row, shard in zip(ordered, divide(config, cache, [[row] for row in ordered], shards), strict=True):
        shares[shard].append(row)
    return shares


def plan_rounds(
    config: ModelConfig,
    cache: CacheConfig,
    rows: Sequence[Row],
    *,
    shards: int = 1,
    batch_size: int | None = None,
    rows_of: Callable[[int, int], int] | None = None,
) -> list[Round]:
    """Plans a run.

    Args:
        config: the architecture.
        cache: how prefixes are reused.
        rows: what to run.
        shards: data shards.
        batch_size: most rows of a batch, as in `plan_batches`.
        rows_of: as there, where `batch_size` is None.

    Returns:
        Rounds of one batch a shard, every row in exactly one of them; where a shard has none left, `IDLE`.
    """
    classes: dict[Program, list[list[Batch]]] = {}
    for shard, share in enumerate(share_out(config, cache, rows, shards)):
        for batch in plan_batches(
            share,
            mask_id=config.mask_id,
            cache=cache,
            batch_size=batch_size,
            rows_of=rows_of,
        ):
            of_shard = classes.setdefault(batch.rows[0].program(cache), [[] for _ in range(shards)])
            of_shard[shard].append(batch)
    rounds = []
    for _, of_shard in sorted(classes.items(), key=lambda item: item[0], reverse=True):
        for turn in range(max(map(len, of_shard))):
            rounds.append(tuple(batches[turn] if turn < len(batches) else IDLE for batches in of_shard))
    return rounds
