"""Exact counts of floating-point operations, a multiply-add counted as two: what a policy costs before anything is run.

Counted are matrix products (projections, MLP, attention, head); norms, rotary embedding and softmax are left out.
"""

from __future__ import annotations

import dataclasses

from bicache_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """One row's run.

    Attributes:
        prefix: P; 0 for no prefix cache.
        suffix: U.
        steps: denoising steps.
        block: positions that the head looks at in a step.
        boundary: b.
        refresh_interval: N.
        rows_per_prefix: rows over which the encoding of the prefix is spread.
    """

    prefix: int
    suffix: int
    steps: int
    block: int
    boundary: int = 0
    refresh_interval: int = 1
    rows_per_prefix: float = 1.0


def kv_flops(config: ModelConfig, tokens: int) -> int:
    """Key and value projections of one layer."""
    return 4 * tokens * config.d_model * config.num_kv_heads * config.head_dim


def query_flops(config: ModelConfig, tokens: int) -> int:
    """Query projection of one layer."""
    return 2 * tokens * config.d_model * config.num_heads * config.head_dim


def attention_flops(config: ModelConfig, queries: int, keys: int) -> int:
    """Scores and weighted values of one layer."""
    return 4 * queries * keys * config.num_heads * config.head_dim


def finish_flops(config: ModelConfig, tokens: int) -> int:
    """Output projection and MLP of one layer."""
    return 2 * tokens * config.d_model * (config.num_heads * config.head_dim + 3 * config.d_mlp)


def layer_flops(config: ModelConfig, tokens: int, keys: int) -> int:
    """One whole layer for `tokens` tokens that attend to `keys`."""
    return (
        kv_flops(config, tokens)
        + query_flops(config, tokens)
        + attention_flops(config, tokens, keys)
        + finish_flops(config, tokens)
    )


def head_flops(config: ModelConfig, positions: int) -> int:
    """Logits of `positions` positions."""
    return 2 * positions * config.d_model * config.vocab_size


def encode_flops(config: ModelConfig, prefix: int, boundary: int) -> int:
    """A prefix alone: layers below the boundary, and K and V of the layer at it."""
    if not prefix:
        return 0
    boundary = min(boundary, config.num_layers - 1)
    return boundary * layer_flops(config, prefix, prefix) + kv_flops(config, prefix)


def reuse_flops(config: ModelConfig, job: Job) -> int:
    """A step that runs suffix tokens only, without the head."""
    return config.num_layers * layer_flops(config, job.suffix, job.prefix + job.suffix)


def refresh_flops(config: ModelConfig, job: Job, *, published: bool) -> float:
    """A step that recomputes the deep prefix KV, without the head.

    The published algorithm runs whole layers `b..L-1` over the prefix. Three parts of that change no token and are left
    out here: K and V of layer b, its queries but for one row of each prefix, and in layer L - 1 all but K and V.
    """
    total, deep = job.prefix + job.suffix, config.num_layers - job.boundary
    whole = float(reuse_flops(config, job) + max(deep, 0) * layer_flops(config, job.prefix, total))
    if published or deep <= 0 or not job.prefix:
        return whole
    if deep == 1:
        return float(reuse_flops(config, job))
    saved_at_boundary = kv_flops(config, job.prefix) + query_flops(config, job.prefix) * (1 - 1 / job.rows_per_prefix)
    saved_at_top = layer_flops(config, job.prefix, total) - kv_flops(config, job.prefix)
    return whole - saved_at_boundary - saved_at_top


def row_flops(config: ModelConfig, job: Job, *, published: bool = False) -> float:
    """All of a row's run, its share of the prefix's encoding included.

    Args:
        config: the architecture.
        job: the run.
        published: count the algorithm as published rather than what this library executes.

    Returns:
        Floating-point operations.
    """
    refreshes = -(-job.steps // job.refresh_interval) if job.prefix else 0
    encode = encode_flops(config, job.prefix, config.num_layers if published else job.boundary)
    return (
        refreshes * refresh_flops(config, job, published=published)
        + (job.steps - refreshes) * reuse_flops(config, job)
        + job.steps * head_flops(config, job.block)
        + encode / job.rows_per_prefix
    )


def gain_limit(config: ModelConfig, job: Job) -> float:
    """How much more throughput than no cache the published algorithm can give for this job, by operations alone."""
    none = dataclasses.replace(job, prefix=0, suffix=job.prefix + job.suffix)
    return row_flops(config, none, published=True) / row_flops(config, job, published=True)
