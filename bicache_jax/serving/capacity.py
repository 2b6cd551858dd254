"""What a device can hold and do, from shapes alone: neither the device nor a checkpoint is needed.

A `Shape` is a batch of equal rows; `bicache plan --config`, `bicache aot` and the studies in `scripts/` all start from
it. Memory is the planner's (`bicache_jax.serving.memory`). Requests an hour are a roofline's: an upper bound.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp

from bicache_jax.core.boundary import boundary_at
from bicache_jax.core.buckets import count_bucket, length_bucket
from bicache_jax.core.config import (
    CACHED_BLOCK,
    BlockCache,
    CacheConfig,
    CacheDtype,
    ModelConfig,
    Policy,
    Quantize,
    SamplingConfig,
)
from bicache_jax.core.device import Copies
from bicache_jax.core.types import BicacheError, Request
from bicache_jax.serving.flops import Job, batch_seconds, jobs
from bicache_jax.serving.grouping import Batch, Row, default_rows, prefix_ratio
from bicache_jax.serving.memory import RESERVE, Footprint, Memory
from bicache_jax.sharding import Partition, mesh_sizes
from bicache_jax.wiring import Device, device, model_shape, published_table

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of equal rows.

    Attributes:
        config: name of a model shape.
        prefix: P.
        suffix: U; without a prefix cache a row has P + U tokens.
        rows: B per data shard; `max`: as many as fit; `auto`: as many as the engine takes, which are fewer where the
            memory is large.
        per_prefix: rows that share a prefix.
        policy: how prefixes are reused; `auto`: `none` if there is no prefix.
        boundary: b; None: from the published table, or half of the layers where there is none; under block-causal
            attention always L.
        gen_length: response tokens.
        block_length: tokens per block; None: the model's own under block-causal attention, else 32.
        steps: denoising steps; None: one token a step.
        block_cache: what is frozen inside a block.
        refresh_interval: N.
        dtype: dtype of parameters and caches.
        quantize: format of the weights.
        cache_dtype: how prefix KV are kept.
    """

    config: str
    _: dataclasses.KW_ONLY
    prefix: int = 1024
    suffix: int = 512
    rows: int | Literal["auto", "max"] = "auto"
    per_prefix: int = 16
    policy: Policy = "auto"
    boundary: int | None = None
    gen_length: int = 256
    block_length: int | None = None
    steps: int | None = None
    block_cache: BlockCache = "off"
    refresh_interval: int | Literal["auto"] = "auto"
    dtype: str = "bfloat16"
    quantize: Quantize = "none"
    cache_dtype: CacheDtype = "auto"

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return dataclasses.replace(model_shape(self.config), quantize=self.quantize)

    @property
    def cache(self) -> CacheConfig:
        """How prefixes are reused, the policy settled.

        Raises:
            BicacheError: the policy is not one for the model's attention.
        """
        policy = self.policy if self.prefix else "none"
        try:
            cache = CacheConfig(
                policy,
                refresh_interval=self.refresh_interval,
                block_cache=self.block_cache,
                cache_dtype=self.cache_dtype,
            )
            return cache.for_model(self.model)
        except ValueError as error:
            raise BicacheError(str(error)) from None

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens that are cached as a prefix, and tokens of a suffix."""
        whole = self.prefix + self.suffix
        return (0, whole) if self.cache.policy == "none" else (self.prefix, self.suffix)

    @property
    def layers(self) -> int:
        """The boundary that is used."""
        config, policy = self.model, self.cache.policy
        if policy in ("naive", "exact"):
            return config.num_layers
        if policy == "none":
            return 0
        if self.boundary is not None:
            return self.boundary
        table = published_table(config)
        if table is None:
            return config.num_layers // 2
        return boundary_at(table.table, prefix_ratio(self.prefix, self.prefix + self.suffix))

    @property
    def sampling(self) -> SamplingConfig:
        """How rows are decoded."""
        config = self.model
        response = min(self.gen_length, self.sizes[1] - config.shifted)  # shifted logits need a prompt token first
        block = min(self.block_length or (config.block_length if config.block_causal else CACHED_BLOCK), response)
        return SamplingConfig(response - response % block, self.steps, block)

    def footprint(self, split: int, copies: Copies) -> Footprint:
        """Memory of batches on a device that holds one of `split` parts of the model."""
        return _footprint(self.model, split, self.layers, self.dtype, self.cache, copies)

    def most_rows(self, limit: float, split: int, copies: Copies) -> int:
        """The most rows of which the planner says that they fit into so many bytes; 0: not even one."""
        prefix, suffix = map(length_bucket, self.sizes)
        return self.footprint(split, copies).most_rows(limit, prefix=prefix, suffix=suffix, per_prefix=self.per_prefix)

    def settled(self, most: int) -> int:
        """The rows, where so many fit at most."""
        if isinstance(self.rows, int):
            return self.rows
        return most if self.rows == "max" else min(most, default_rows(*map(length_bucket, self.sizes)))

    def memory(self, rows: int, split: int, copies: Copies) -> Memory:
        """What the planner says that so many rows need."""
        prefix, suffix = map(length_bucket, self.sizes)
        groups = count_bucket(-(-rows // self.per_prefix))
        return self.footprint(split, copies).memory(groups=groups, prefix=prefix, rows=rows, suffix=suffix)

    def batch(self, rows: int) -> Batch:
        """So many rows over as many prefixes as they need."""
        prefix, suffix = self.sizes
        groups, sampling, boundary = -(-rows // self.per_prefix), self.sampling, self.layers
        rest, made = tuple(range(suffix - sampling.gen_length)), []
        for number in range(rows):
            own = (number * groups // rows, *range(1, prefix))[:prefix]
            made.append(Row(Request(str(number), own + rest, prefix, sampling), 0, prefix, 0, boundary))
        prefixes = tuple(dict.fromkeys(row.prefix for row in made))
        return Batch(tuple(made), prefixes, tuple(prefixes.index(row.prefix) for row in made), boundary)

    def job(self, rows: int) -> Job:
        """The run of each of so many rows."""
        return jobs(self.batch(rows).rows, self.cache)[0]

    def seconds(self, rows: int, chip: Device, split: int, *, job: Job | None = None, links: bool = True) -> float:
        """Lower bound of the time of a batch: every pass takes the larger of arithmetic and memory traffic.

        Products with weights count at the peak of the type in which they are made, attention at that of `dtype`. The
        sums of a model that is split come on top, as compiled programs overlap nothing with them.

        Args:
            rows: B.
            chip: the device.
            split: devices over which the model is cut.
            job: the run of each row; None: this shape's.
            links: whether the sums take any time.

        Raises:
            BicacheError: a figure that it takes is not published.
        """
        products = chip.peak("int8" if self.quantize == "w8a8" else self.dtype)
        return batch_seconds(
            self.model,
            job or self.job(rows),
            rows,
            peak=products * split,
            attention=products / chip.peak(self.dtype),
            bandwidth=chip.memory_gb_per_second * 1e9 * split,
            itemsize=jnp.dtype(self.dtype).itemsize,
            published=False,
            sums=(lambda nbytes: chip.all_reduce_seconds(nbytes, split)) if links else lambda nbytes: 0.0,
        )


@functools.lru_cache(maxsize=64)  # shapes of parameters come from tracing their initialisation
def _footprint(
    config: ModelConfig, split: int, boundary: int, dtype: str, cache: CacheConfig, copies: Copies
) -> Footprint:
    return Footprint.of(
        Partition(config, split),
        [boundary],
        jnp.dtype(dtype),
        block_cache=cache.block_cache != "off",
        copies=copies,
        cache_dtype=cache.cache_dtype,
    )


def capacity(shape: Shape, where: str, mesh: str = "", *, share: float | None = None) -> dict[str, Any]:
    """What a model needs and does on devices that are not here.

    Args:
        shape: the batch.
        where: the devices, as `bicache_jax.configs.device` takes them.
        mesh: how they are used, for example `data=2,model=4`; empty: all for data.
        share: share of their memory that JAX gives to programs; None: its default.

    Returns:
        JSON values; sizes in bytes. `requests_per_hour` is None, with the reason, where no figure is published.

    Raises:
        BicacheError: a name is unknown, devices are missing, or not even one row fits.
    """
    chip, devices = device(where)
    sizes = mesh_sizes(mesh or f"data={devices}")
    data, split = sizes.values()
    if data * split > devices:
        raise BicacheError(f"mesh {mesh}: needs {data * split} devices, {where} has {devices}")
    limit = RESERVE * chip.memory_gib * GIB * (chip.memory_share if share is None else share)
    most, (prefix, suffix) = shape.most_rows(limit, split, chip.copies), map(length_bucket, shape.sizes)
    if not most:
        needed = shape.memory(1, split, chip.copies)
        raise BicacheError(
            f"{shape.config} on {where}: one row needs {needed.total / GIB:.1f} GiB a device, of which"
            f" {needed.params / GIB:.1f} are weights, and {limit / GIB:.1f} may be used: --quantize w8, fewer tokens or"
            " more devices (--mesh model=M) need less"
        )
    rows = shape.settled(most)
    memory, one = (shape.memory(count, split, chip.copies) for count in (rows, 1))
    found: dict[str, Any] = {
        "config": shape.config,
        "device": where,
        "devices": devices,
        "mesh": sizes,
        "dtype": shape.dtype,
        "quantize": shape.quantize,
        "cache_dtype": shape.cache_dtype,
        "policy": shape.cache.policy,
        "block_cache": shape.cache.block_cache,
        "boundary": shape.layers,
        "prefix": prefix,
        "suffix": suffix,
        "response": shape.sampling.gen_length,
        "steps": shape.sampling.num_steps,
        "rows": rows,
        "prefixes": count_bucket(-(-rows // shape.per_prefix)),
        "weights": memory.params,
        "per_prefix": one.prefixes,
        "per_row": one.total - one.params - one.prefixes,
        "total": memory.total,
        "usable": int(limit),
        "memory": int(chip.memory_gib * GIB),
        "fits": memory.total <= limit,
        "usual_rows": min(most, default_rows(prefix, suffix)),
        "largest_rows": most,
        "largest_rows_all_shards": most * data,
        "source": chip.source,
    }
    try:
        seconds = shape.seconds(rows, chip, split)
        found |= {"requests_per_hour": round(3600 / seconds * rows * data, 1), "no_estimate": None}
    except BicacheError as error:
        found |= {"requests_per_hour": None, "no_estimate": str(error)}
    return found


_BYTES = ("weights", "per_prefix", "per_row", "total", "usable", "memory")


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"


def describe(found: dict[str, Any]) -> str:
    """`capacity` for people."""
    gib = {name: f"{found[name] / GIB:.2f}" for name in _BYTES}
    rows, prefixes = _count(found["rows"], "row"), _count(found["prefixes"], "prefix", "es")
    cached = f"b={found['boundary']}, " if found["policy"] in ("bicache", "naive") else ""
    block = "" if found["block_cache"] == "off" else f", block cache {found['block_cache']}"
    mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    if found["rows"] > found["usual_rows"]:
        rows_hint = f" (generate takes {found['usual_rows']} unless --batch-size says more)"
    else:
        rows_hint = ""
    lines = [
        f"{found['config']} on {found['device']}, mesh {mesh}: {found['dtype']}, quantize {found['quantize']}, policy"
        f" {found['policy']}{block}",
        f"P={found['prefix']} U={found['suffix']} {cached}{found['response']} response tokens in"
        f" {found['steps']} steps",
        "",
        "GiB a device",
        f"  {'weights':<36}{gib['weights']:>6}",
        f"  {'a prefix (shared KV, hidden states)':<36}{gib['per_prefix']:>6}",
        f"  {'a row (its KV, activations)':<36}{gib['per_row']:>6}",
        f"  {rows + ' over ' + prefixes + ', in all':<36}{gib['total']:>6}",
        f"  {'may be used':<36}{gib['usable']:>6}  of {gib['memory']}",
        "",
        f"largest batch: {_count(found['largest_rows'], 'row')} on each of"
        f" {_count(found['mesh']['data'], 'data shard')}{rows_hint}"
        + ("" if found["fits"] else f"; {rows} do not fit"),
        f"requests an hour: no estimate ({found['no_estimate']})"
        if found["requests_per_hour"] is None
        else f"requests an hour: at most {found['requests_per_hour']:,.0f} with {rows} a shard, by the published peaks"
        " (an estimate; nothing ran)",
    ]
    return "\n".join(lines)
