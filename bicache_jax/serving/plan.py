"""The plan of a run, computed from shapes: batches, buffers, memory, and the expected gain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp

from bicache_jax.core.buckets import prefix_bucket, suffix_bucket
from bicache_jax.core.config import CacheConfig, ModelConfig
from bicache_jax.core.device import Copies, DeviceMemory
from bicache_jax.core.kv import token_bytes
from bicache_jax.core.table import Table
from bicache_jax.serving.flops import jobs, row_flops
from bicache_jax.serving.grouping import Batch, Row, default_rows
from bicache_jax.serving.memory import RESERVE, Buffers, Footprint, Memory
from bicache_jax.serving.rounds import Round, round_shape
from bicache_jax.sharding import Partition


def rows_fitting(
    boundaries: Collection[int],
    partition: Partition,
    weights: int,
    device: DeviceMemory,
    cache: CacheConfig,
    dtype: jnp.dtype,
) -> Callable[[int, int], int]:
    """How many rows a batch may have, by buckets of P and U: the default, or fewer if memory is short.

    Args:
        boundaries: those of the run; they determine the size of the caches.
        partition: how the model is split.
        weights: bytes of the parameters on a device.
        device: memory of a device.
        cache: how prefixes are reused.
        dtype: dtype of the caches.
    """
    footprint = Footprint.of(
        partition,
        boundaries,
        dtype,
        params=weights,
        block_cache=cache.block_cache != "off",
        copies=device.copies,
        cache_dtype=cache.cache_dtype,
    )

    def most(prefix: int, suffix: int) -> int:
        fitting = footprint.most_rows(RESERVE * device.nbytes, prefix=prefix, suffix=suffix)
        return max(1, min(default_rows(prefix, suffix), fitting))

    return most


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What `Engine.generate` would do.

    Attributes:
        config: the model's architecture.
        dtype: dtype of parameters and caches.
        cache: how prefixes are reused.
        rounds: batches in the order in which they run; a round has one batch per data shard.
        buffers: cache sizes of the run.
        part: a device's part of the architecture; None: all of it.
        weights: bytes of the parameters on a device; 0 if unknown.
        device: memory of a device; None if unknown.
        growing: whether its shapes are those of a conversation, which the next turn finds compiled.
    """

    config: ModelConfig
    dtype: jnp.dtype
    cache: CacheConfig
    rounds: tuple[Round, ...]
    buffers: Buffers
    part: ModelConfig | None = None
    weights: int = 0
    device: DeviceMemory | None = None
    growing: bool = False

    @property
    def batches(self) -> list[Batch]:
        """All batches that have rows."""
        return [batch for batches in self.rounds for batch in batches if batch.rows]

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for batch in self.batches for row in batch.rows]

    @property
    def gain(self) -> float:
        """Operations without a prefix cache divided by the planned ones; an upper bound of the speed-up."""
        planned = none = 0.0
        for job in jobs(self.rows, self.cache):
            planned += row_flops(self.config, job)
            none += row_flops(self.config, job.without_prefix())
        return none / planned if planned else 1.0

    def shape(self, *batches: Batch) -> tuple[int, int, int, int]:
        """(G, P, B, U) in buckets, of a batch or of the batches of a round (`round_shape`)."""
        return round_shape(batches, growing=self.growing)

    def prefix_bucket(self, tokens: int) -> int:
        """P for a prefix of so many tokens."""
        return prefix_bucket(tokens, growing=self.growing)

    def suffix_bucket(self, tokens: int) -> int:
        """U for a suffix of so many tokens."""
        return suffix_bucket(tokens, growing=self.growing)

    def cache_bytes(self, batch: Batch) -> int:
        """Bytes of a batch's KV: the shared KV of its prefixes and the deep KV of its rows."""
        prefixes, prefix, rows, _ = self.shape(batch)
        token = token_bytes(self.config, self.dtype.itemsize, self.cache.cache_dtype)
        return token * prefix * (self.buffers.shallow * prefixes + self.buffers.deep * rows)

    def memory(self, *batches: Batch) -> Memory:
        """Planned memory of a device while a batch or a round is decoded."""
        groups, prefix, rows, suffix = self.shape(*batches)
        copies = Copies() if self.device is None else self.device.copies
        cache = self.cache
        footprint = Footprint(
            self.part or self.config,
            self.weights,
            self.buffers,
            self.dtype,
            cache.block_cache != "off",
            copies,
            cache.cache_dtype,
        )
        return footprint.memory(groups=groups, prefix=prefix, rows=rows, suffix=suffix)

    @property
    def peak(self) -> Memory | None:
        """Planned memory of a device in the round that takes most; None if there is nothing to run."""
        memories = (self.memory(*batches) for batches in self.rounds)
        return max(memories, key=lambda memory: memory.total, default=None)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; sizes in bytes."""
        most = self.peak
        return {
            "rows": len(self.rows),
            "prefixes": len({prefix for batch in self.batches for prefix in batch.prefixes if prefix}),
            "policy": self.cache.policy,
            "block_cache": self.cache.block_cache,
            "dtype": self.dtype.name,
            "cache_dtype": self.cache.cache_dtype,
            "shared_layers": self.buffers.shallow,
            "layers_per_row": self.buffers.deep,
            "batches": [self._batch_json(batch) for batch in self.batches],
            "memory": None if most is None else {**dataclasses.asdict(most), "total": most.total},
            "device_memory": None if self.device is None else self.device.nbytes,
            "gain": self.gain,
        }

    def _batch_json(self, batch: Batch) -> dict[str, Any]:
        ratios = [row.ratio for row in batch.rows]
        groups, prefix, rows, suffix = self.shape(batch)
        return {
            "rows": len(batch.rows),
            "prefixes": len(batch.prefixes),
            "ratio": [min(ratios), max(ratios)],
            "boundary": batch.boundary,
            "shape": {"B": rows, "G": groups, "P": prefix, "U": suffix},
            "steps": batch.rows[0].request.sampling.num_steps,
            "refresh_interval": self.cache.interval(batch.rows[0].request.sampling),
            "cache": self.cache_bytes(batch),
        }

    def table(self) -> Table:
        """The plan for people: a line for each batch."""
        plan = self.to_json()
        intervals = sorted({batch["refresh_interval"] for batch in plan["batches"]})
        rows = []
        for number, batch in enumerate(plan["batches"], 1):
            low, high = batch["ratio"]
            ratio = f"{low}" if low == high else f"{low}-{high}"
            sizes = [batch["shape"][letter] for letter in "BGPU"]
            rows.append(
                [number, batch["rows"], batch["prefixes"], ratio, batch["boundary"], *sizes, batch["steps"]]
                + [f"{batch['cache'] / 2**20:,.1f}"]
            )
        return Table(
            (*"batch rows prefixes".split(), "r %", *"b B G P U steps".split(), "cache MiB"),
            rows,
            above=(
                f"{plan['rows']} rows over {plan['prefixes']} prefixes in {len(plan['batches'])} batches; "
                f"policy {plan['policy']}, refresh interval N = {', '.join(map(str, intervals)) or '-'}",
                f"cache buffers: {plan['shared_layers']} shared layers, {plan['layers_per_row']} layers per row, "
                f"{plan['dtype'] if plan['cache_dtype'] == 'auto' else plan['cache_dtype']}",
            ),
            below=(
                _memory_line(plan["memory"], plan["device_memory"]),
                f"expected gain over no cache: at most {plan['gain']:.2f}x, by counted operations",
            ),
        )

    def describe(self) -> str:
        """The plan as text."""
        return str(self.table())

    def __repr__(self) -> str:
        return self.describe()  # the fields hold every token of every request

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _memory_line(memory: dict[str, int] | None, device: int | None) -> str:
    if memory is None:
        return "memory of a device: nothing to run"
    parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in memory.items() if size and name != "total")
    known = "" if device is None else f" of {device / 2**20:.0f}"
    return f"memory of a device, MiB: at most {memory['total'] / 2**20:.0f}{known} ({parts})"
