"""Estimates device memory from shapes, without a compiler; the planner sizes batches by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.buckets import count_bucket, layer_bucket
from bicache_jax.core.config import CacheDtype, ModelConfig
from bicache_jax.core.device import Copies, DeviceMemory
from bicache_jax.core.kv import token_bytes
from bicache_jax.serving.rounds import Round
from bicache_jax.sharding import MODEL, Partition, param_specs
from bicache_jax.wiring import abstract_params, backbone_for

RESERVE = 0.92
"""Largest share of a device's memory that a plan uses; the rest is for programs, fragmentation and estimation error."""

KEPT_SHARE = 1 / 16
"""Share of a device's memory, at most, in which encoded prefixes are kept between runs."""
KEPT_ELSEWHERE = 2**28
"""Bytes for them where the platform does not say how much memory there is, as on CPUs."""

_PLAIN = Copies()


def kept_bytes(device: DeviceMemory | None, weights: int) -> int:
    """Bytes in which an engine keeps encoded prefixes between runs, where it is not told.

    Args:
        device: memory of a device; None if unknown.
        weights: bytes of the parameters on it.
    """
    if device is None:
        return KEPT_ELSEWHERE
    return int(max(0, min(KEPT_SHARE * device.nbytes, (RESERVE * device.nbytes - weights) / 4)))


def prefix_bytes(
    config: ModelConfig, itemsize: int, *, length: int, layers: int, slots: int = 1, cache_dtype: CacheDtype = "auto"
) -> int:
    """Bytes of a prefix's encoding on a device.

    Args:
        config: one shard's part of the architecture.
        itemsize: bytes of a number in the model's dtype.
        length: P, padding included.
        layers: layers of KV.
        slots: boundaries whose hidden states are kept.
        cache_dtype: how KV are kept.
    """
    return length * (layers * token_bytes(config, itemsize, cache_dtype) + slots * config.d_model * itemsize)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while a batch is decoded.

    Attributes:
        params: parameters, and copies of them.
        prefixes: shared KV and hidden states of the batch's prefixes.
        deep: deep prefix KV, per row.
        suffixes: KV of a block cache.
        activations: peak activations of a refresh step.
    """

    params: int
    prefixes: int
    deep: int
    suffixes: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.params + self.prefixes + self.deep + self.suffixes + self.activations


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Sizes of the caches; constant during a run so that batches share programs.

    Attributes:
        shallow: layers of shared KV, `max b + 1` rounded up to a multiple of 4.
        deep: layers of KV per row, `L - 1 - min b` rounded up to a multiple of 4.
        slots: number of boundaries for which a prefix keeps hidden states.
    """

    shallow: int
    deep: int
    slots: int

    @classmethod
    def of(cls, rounds: Iterable[Round], num_layers: int) -> Buffers:
        """The buffers that a run needs."""
        last = num_layers - 1
        used: dict[tuple[int, ...], set[int]] = {}
        for batch in (batch for batches in rounds for batch in batches if batch.rows):
            for prefix in batch.prefixes:
                used.setdefault(prefix, set()).add(clamp_boundary(batch.boundary, num_layers))
        boundaries = set().union(*used.values())
        slots = count_bucket(max(map(len, used.values()), default=1))
        return cls.between(min(boundaries, default=last), max(boundaries, default=0), num_layers, slots)

    @classmethod
    def between(cls, least: int, most: int, num_layers: int, slots: int = 1) -> Buffers:
        """The buffers of boundaries from `least` to `most`."""
        last = num_layers - 1
        return cls(layer_bucket(most + 1, num_layers), layer_bucket(last - least, last), slots)


def params_bytes(params: Any) -> int:
    """Bytes of the parameters on one device, from arrays or from shapes with shardings."""

    def one(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(params)))


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Sizes from which the memory of any batch on a device is estimated.

    Attributes:
        config: one shard's part of the architecture (`bicache_jax.sharding.Partition.local`).
        params: bytes of the parameters on a device.
        buffers: layers of the caches.
        dtype: dtype of activations and caches.
        block_cache: whether the suffixes' KV are kept.
        copies: additional memory of the compiler.
        cache_dtype: how prefix KV are kept.
    """

    config: ModelConfig
    params: int
    buffers: Buffers
    dtype: jnp.dtype
    block_cache: bool = False
    copies: Copies = _PLAIN
    cache_dtype: CacheDtype = "auto"

    @classmethod
    def of(
        cls,
        partition: Partition,
        boundaries: Collection[int],
        dtype: jnp.dtype,
        *,
        params: int | None = None,
        block_cache: bool = False,
        copies: Copies = _PLAIN,
        cache_dtype: CacheDtype = "auto",
    ) -> Footprint:
        """The footprint of a model on a device.

        Args:
            partition: how the model is split.
            boundaries: boundaries in use; they determine the size of the caches.
            dtype: dtype of activations and caches, and of the parameters if `params` is None.
            params: bytes of the parameters on a device; None: from their shapes.
            block_cache: whether the suffixes' KV are kept.
            copies: additional memory of the compiler.
            cache_dtype: how prefix KV are kept.
        """
        num_layers = partition.logical.num_layers
        used = [clamp_boundary(boundary, num_layers) for boundary in boundaries]
        buffers = Buffers.between(min(used, default=0), max(used, default=0), num_layers)
        if params is None:
            shapes = abstract_params(partition.config, dtype)
            specs = param_specs(backbone_for(partition.config).axes, shapes)
            params = sum(
                leaf.size * leaf.dtype.itemsize // (partition.shards if MODEL in spec else 1)
                for leaf, spec in zip(jax.tree.leaves(shapes), jax.tree.leaves(specs), strict=True)
            )
        return cls(partition.local, params, buffers, dtype, block_cache, copies, cache_dtype)

    def memory(self, *, groups: int, prefix: int, rows: int, suffix: int) -> Memory:
        """Memory of the decode program.

        Activations are those of a refresh step in attention or in the MLP, whichever is larger. Attention holds the
        residual stream and its norm, queries, keys and values twice (as projected and as attention reads them), and the
        attended values. The total is within 6 % of the TPU compiler's figures for LLaDA-8B and Dream-7B on four
        generations (`scripts/results/what_fits.md`; in 8 bits `one_chip.md`).

        Args:
            groups: G.
            prefix: P.
            rows: B.
            suffix: U.

        Returns:
            The estimate.
        """
        config, itemsize = self.config, self.dtype.itemsize
        kept, kv = (token_bytes(config, itemsize, form) for form in (self.cache_dtype, "auto"))
        deep = self.buffers.deep if prefix else 0
        tokens = rows * (suffix + (prefix if deep else 0))
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention = 2 * config.d_model + 2 * (heads + 2 * kv_heads) + heads
        # A mixture sorts its tokens: each is there once for every expert that it runs through, in front and behind.
        routed = 0 if config.experts is None else 2 * config.experts.per_token * config.d_model
        columns = max(config.d_mlp, config.mlp_columns)
        mlp = 2 * config.d_model + self.copies.mlp * columns + routed
        integers = columns if config.quantize == "w8a8" else 0  # beside the floats that they are made from
        return Memory(
            params=self.params * (1 + self.copies.weights),
            prefixes=groups * prefix * (self.buffers.shallow * kept + config.d_model * itemsize),
            deep=deep * rows * prefix * kept,
            suffixes=config.num_layers * rows * suffix * kv if self.block_cache else 0,
            activations=round(tokens * max(attention * itemsize, mlp * itemsize + integers)),
        )

    def most_rows(self, limit: float, *, prefix: int, suffix: int, per_prefix: int = 1) -> int:
        """Largest bucket of rows with a decode program that fits into `limit` bytes; 0 if one row does not fit.

        Args:
            limit: bytes that may be used on a device.
            prefix: P.
            suffix: U.
            per_prefix: rows that share a prefix.
        """
        found, rows = 0, 1
        while rows <= 4096:
            groups = count_bucket(-(-rows // per_prefix))
            if self.memory(groups=groups, prefix=prefix, rows=rows, suffix=suffix).total > limit:
                break
            found, rows = rows, count_bucket(rows + 1)
        return found
