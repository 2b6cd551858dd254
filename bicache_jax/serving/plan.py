"""What a run will do, from shapes alone: rows of a batch, buffers, memory, and the gain that token counts allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from bicache_jax.core.buckets import count_bucket, length_bucket
from bicache_jax.core.config import CacheConfig, ModelConfig
from bicache_jax.core.device import Copies, DeviceMemory
from bicache_jax.serving.flops import Job, row_flops
from bicache_jax.serving.grouping import Batch, Row, default_rows
from bicache_jax.serving.memory import RESERVE, Buffers, Footprint, Memory
from bicache_jax.serving.rounds import Round


def rows_fitting(
    rows: Sequence[Row], part: ModelConfig, weights: int, room: DeviceMemory, cache: CacheConfig, dtype: jnp.dtype
) -> Callable[[int, int], int]:
    """How many rows a batch may have, by buckets of P and U: as many as are usual, fewer where memory is short.

    Args:
        rows: the run; its boundaries size the caches.
        part: a device's part of the architecture.
        weights: bytes of the parameters on a device.
        room: what a device offers.
        cache: how prefixes are reused.
        dtype: of the caches.
    """
    boundaries = [min(row.boundary, part.num_layers - 1) for row in rows]
    buffers = Buffers.between(min(boundaries, default=0), max(boundaries, default=0), part.num_layers)
    footprint = Footprint(part, weights, buffers, dtype, cache.block_cache != "off", room.copies)

    def most(prefix: int, suffix: int) -> int:
        fitting = footprint.most_rows(RESERVE * room.nbytes, prefix=prefix, suffix=suffix)
        return max(1, min(default_rows(prefix, suffix), fitting))

    return most


def jobs(rows: Sequence[Row]) -> list[Job]:
    """The work of each row, the encoding of a prefix spread over the rows that share it."""
    sharing: dict[tuple[int, ...], int] = {}
    for row in rows:
        prefix = row.prefix
        sharing[prefix] = sharing.get(prefix, 0) + 1
    return [
        Job(
            prefix=row.prefix_len,
            suffix=row.suffix_len,
            steps=row.request.sampling.num_steps,
            block=row.request.sampling.block_size,
            response=row.request.sampling.gen_length,
            boundary=row.boundary,
            rows_per_prefix=sharing[row.prefix],
        )
        for row in rows
    ]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `Engine.generate` would do.

    Attributes:
        config: the model's architecture.
        dtype: dtype of parameters and caches.
        cache: how prefixes are reused.
        rounds: batches in the order in which they run, those of all data shards at a time.
        buffers: cache sizes of the run.
        part: a device's part of the architecture, where it is not all of it.
        weights: bytes of the parameters on a device; 0 where they are not known.
        room: what a device offers; None where it is not known.
    """

    config: ModelConfig
    dtype: jnp.dtype
    cache: CacheConfig
    rounds: tuple[Round, ...]
    buffers: Buffers
    part: ModelConfig | None = None
    weights: int = 0
    room: DeviceMemory | None = None

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
        """Ratio of the operations without a prefix cache to those planned; an upper bound of the speed-up."""
        planned = none = 0.0
        for row, job in zip(self.rows, jobs(self.rows), strict=True):
            interval = self.cache.interval(row.request.sampling)
            job = dataclasses.replace(job, refresh_interval=interval, block_cache=self.cache.block_cache)
            planned += row_flops(self.config, job)
            none += row_flops(self.config, job.without_prefix())
        return none / planned if planned else 1.0

    def shape(self, *batches: Batch) -> tuple[int, int, int, int]:
        """(G, P, B, U) in buckets, of a batch or of the batches of a round; twins of guidance are rows."""
        prefix = length_bucket(max(len(prefix) for batch in batches for prefix in batch.prefixes))
        suffix = length_bucket(max(row.suffix_len for batch in batches for row in batch.rows))
        groups = max(count_bucket(len(batch.prefixes)) for batch in batches)
        num_rows = max(count_bucket(len(batch.rows)) for batch in batches)
        return groups, prefix, num_rows * (1 + any(batch.guided for batch in batches)), suffix

    def cache_bytes(self, batch: Batch) -> int:
        """KV of a batch: shared ones of its prefixes and the rows' own deep ones."""
        prefixes, prefix, rows, _ = self.shape(batch)
        token = 2 * self.config.num_kv_heads * self.config.head_dim * self.dtype.itemsize
        return token * prefix * (self.buffers.shallow * prefixes + self.buffers.deep * rows)

    def memory(self, *batches: Batch) -> Memory:
        """Memory of a device while a batch or a round is decoded, as planned."""
        groups, prefix, rows, suffix = self.shape(*batches)
        copies = Copies() if self.room is None else self.room.copies
        block_cache = self.cache.block_cache != "off"
        footprint = Footprint(self.part or self.config, self.weights, self.buffers, self.dtype, block_cache, copies)
        return footprint.memory(groups=groups, prefix=prefix, rows=rows, suffix=suffix)

    def _memory_line(self) -> str:
        if not self.rounds:
            return "memory of a device: nothing to run"
        most = max((self.memory(*batches) for batches in self.rounds), key=lambda memory: memory.total)
        parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in dataclasses.asdict(most).items() if size)
        known = "" if self.room is None else f" of {self.room.nbytes / 2**20:.0f}"
        return f"memory of a device, MiB: at most {most.total / 2**20:.0f}{known} ({parts})"

    def describe(self) -> str:
        """The plan as a table for people."""
        rows = self.rows
        prefixes = {prefix for batch in self.batches for prefix in batch.prefixes if prefix}
        intervals = sorted({self.cache.interval(row.request.sampling) for row in rows})
        lines = [
            f"{len(rows)} rows over {len(prefixes)} prefixes in {len(self.batches)} batches; "
            f"policy {self.cache.policy}, refresh interval N = {', '.join(map(str, intervals)) or '-'}",
            f"cache buffers: {self.buffers.shallow} shared layers, {self.buffers.deep} layers per row, "
            f"{self.dtype.name}",
            "",
            f"{'batch':>5} {'rows':>5} {'prefixes':>8} {'r %':>9} {'b':>4} {'B':>4} {'G':>4} {'P':>6} {'U':>6} "
            f"{'steps':>6} {'cache MiB':>10}",
        ]
        for number, batch in enumerate(self.batches, 1):
            ratios = sorted({row.ratio for row in batch.rows})
            ratio = f"{ratios[0]}" if len(ratios) == 1 else f"{ratios[0]}-{ratios[-1]}"
            groups, prefix, count, suffix = self.shape(batch)
            lines.append(
                f"{number:>5} {len(batch.rows):>5} {len(batch.prefixes):>8} {ratio:>9} {batch.boundary:>4} {count:>4} "
                f"{groups:>4} {prefix:>6} {suffix:>6} {batch.rows[0].request.sampling.num_steps:>6} "
                f"{self.cache_bytes(batch) / 2**20:>10.1f}"
            )
        lines += [
            "",
            self._memory_line(),
            f"expected gain over no cache: at most {self.gain:.2f}x, by counted operations",
        ]
        return "\n".join(lines)
