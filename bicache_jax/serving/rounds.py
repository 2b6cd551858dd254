"""Rounds: the batches that run at the same time, one on every data shard. Pure functions of the host.

A round is one call of one program, so its batches agree in shapes; boundary, settings and prefixes are each shard's.
Every host of a job computes the same rounds from the same requests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from bicache_jax.core.buckets import count_bucket, length_bucket, width_bucket
from bicache_jax.core.config import CacheConfig, ModelConfig
from bicache_jax.serving.balance import Group, pack
from bicache_jax.serving.flops import encode_flops, jobs, row_flops
from bicache_jax.serving.grouping import Batch, Row, plan_batches

Round = tuple[Batch, ...]
IDLE = Batch(rows=(), prefixes=((),), prefix_index=(), boundary=0)
"""What a shard without work runs: nothing but the padding of `round_shape`."""


def round_shape(batches: Sequence[Batch]) -> tuple[int, int, int, int]:
    """(G, P, B, U) in buckets that hold each of the batches.

    This is what all shards of a round are padded to: prefixes with empty ones, rows with rows that are complete from
    the start, tokens with invalid ones. Twins of guidance are rows.
    """
    prefix = length_bucket(max(len(prefix) for batch in batches for prefix in batch.prefixes))
    suffix = length_bucket(max(row.suffix_len for batch in batches for row in batch.rows))
    groups = max(count_bucket(len(batch.prefixes)) for batch in batches)
    num_rows = max(count_bucket(len(batch.rows)) for batch in batches)
    return groups, prefix, num_rows * (1 + any(batch.guided for batch in batches)), suffix


def row_costs(config: ModelConfig, cache: CacheConfig, rows: Sequence[Row]) -> list[float]:
    """Operations of each row, without the encoding of its prefix."""
    return [row_flops(config, dataclasses.replace(job, rows_per_prefix=math.inf)) for job in jobs(rows, cache)]


def share_out(config: ModelConfig, cache: CacheConfig, rows: Sequence[Row], shards: int) -> list[list[Row]]:
    """The rows of each data shard, those of one prefix together as far as shares allow."""
    if shards == 1:
        return [list(rows)]
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: (rows[place].prefix, rows[place].request.index, place)):
        row = rows[place]
        # Rows without a prefix have nothing in common.
        by_prefix.setdefault(row.prefix or (-1 - place,), []).append(place)
    costs = row_costs(config, cache, rows)
    groups = [
        Group(
            setup=max(float(encode_flops(config, rows[place].prefix_len, rows[place].boundary)) for place in places),
            costs=tuple(costs[place] for place in places),
        )
        for places in by_prefix.values()
    ]
    shares: list[list[Row]] = [[] for _ in range(shards)]
    for places, assigned in zip(by_prefix.values(), pack(groups, shards), strict=True):
        for place, shard in zip(places, assigned, strict=True):
            shares[shard].append(rows[place])
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
    classes: dict[tuple[object, ...], list[list[Batch]]] = {}
    for shard, share in enumerate(share_out(config, cache, rows, shards)):
        for batch in plan_batches(
            share,
            mask_id=config.mask_id,
            batch_size=batch_size,
            batch_boundary=cache.batch_boundary,
            rows_of=rows_of,
        ):
            of_shard = classes.setdefault(program_key(batch, cache), [[] for _ in range(shards)])
            of_shard[shard].append(batch)
    rounds = []
    for _, of_shard in sorted(classes.items(), key=lambda item: str(item[0])):
        for turn in range(max(map(len, of_shard))):
            rounds.append(tuple(batches[turn] if turn < len(batches) else IDLE for batches in of_shard))
    return rounds


def program_key(batch: Batch, cache: CacheConfig) -> tuple[object, ...]:
    """What batches of a round must have in common."""
    sampling = batch.rows[0].request.sampling
    _, prefix, _, suffix = round_shape((batch,))
    shape = (
        prefix,
        suffix,
        width_bucket(sampling.block_size),
        length_bucket(sampling.num_steps // sampling.num_blocks),
        sampling.guided,
    )
    return shape if cache.block_cache == "off" else (*shape, sampling.block_size, sampling.num_blocks)
