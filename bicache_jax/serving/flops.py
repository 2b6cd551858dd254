"""Exact counts of floating-point operations (a multiply-add is two): the cost of a policy before anything runs.

Only matrix products are counted (projections, MLP, attention, head), not norms, rotary embedding and softmax.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.config import BlockCache, CacheConfig, ModelConfig
from bicache_jax.serving.grouping import Row


class Pass(NamedTuple):
    """A kind of pass.

    Attributes:
        refresh: whether it refreshes the deep prefix KV.
        span: suffix tokens that it runs.
        keys: tokens that they attend to.
    """

    refresh: bool
    span: int
    keys: int


@dataclasses.dataclass(frozen=True)
class Job:
    """One row's run.

    Attributes:
        prefix: P; 0 for no prefix cache.
        suffix: U.
        steps: denoising steps.
        block: positions for which the head computes logits in a step.
        response: response tokens; 0: one block.
        boundary: b.
        refresh_interval: N.
        block_cache: what is frozen inside a block.
        rows_per_prefix: number of rows that share the cost of encoding the prefix.
        exact: whether finished blocks are kept, under block-causal attention.
    """

    prefix: int
    suffix: int
    steps: int
    block: int
    response: int = 0
    boundary: int = 0
    refresh_interval: int = 1
    block_cache: BlockCache = "off"
    rows_per_prefix: float = 1.0
    exact: bool = False

    def without_prefix(self) -> Job:
        """The same run with the whole prompt in the suffix and no cache."""
        return dataclasses.replace(self, prefix=0, suffix=self.prefix + self.suffix, block_cache="off", exact=False)

    def passes(self) -> Counter[Pass]:
        """Number of steps of each kind."""
        blocks = max(1, -(-self.response // self.block))
        found: Counter[Pass] = Counter()
        for step in range(self.steps):
            block, inside = divmod(step, max(1, self.steps // blocks))
            span, keys = self.suffix, self.prefix + self.suffix
            if self.exact:  # a block against what is finished; at its start also the last one, or the prompt's rest
                rest = max(0, self.suffix - blocks * self.block)
                keys = self.prefix + rest + (1 + block) * self.block
                span = self.block if inside else 2 * self.block if block else rest + self.block
            elif self.block_cache != "off" and inside:
                later = 0 if self.block_cache == "dual" else max(0, blocks - 1 - block)
                span = self.block * (1 + later)
            refresh = bool(self.prefix) and not self.exact and step % self.refresh_interval == 0
            found[Pass(refresh, span, keys)] += 1
        return found


def jobs(rows: Sequence[Row], cache: CacheConfig) -> list[Job]:
    """The run of each row; rows that share a prefix share the cost of encoding it."""
    sharing = Counter(row.prefix for row in rows)
    return [
        Job(
            prefix=row.prefix_len,
            suffix=row.suffix_len,
            steps=row.request.sampling.num_steps,
            block=row.request.sampling.block_size,
            response=row.request.sampling.gen_length,
            boundary=row.boundary,
            refresh_interval=cache.interval(row.request.sampling),
            block_cache=cache.block_cache,
            rows_per_prefix=sharing[row.prefix],
            exact=cache.policy == "exact",
        )
        for row in rows
    ]


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
    """Output projection and MLP of one layer, or the experts that a token runs through and their router."""
    router = 0 if config.experts is None else config.experts.num
    columns = config.num_heads * config.head_dim + 3 * config.mlp_columns + router
    return round(2 * tokens * config.d_model * columns)


def layer_flops(config: ModelConfig, tokens: int, keys: int, attention: float = 1.0) -> float:
    """One whole layer for `tokens` tokens that attend to `keys`.

    An operation of attention counts as `attention` ones, where those of products with weights are faster.
    """
    return (
        kv_flops(config, tokens)
        + query_flops(config, tokens)
        + attention * attention_flops(config, tokens, keys)
        + finish_flops(config, tokens)
    )


def head_flops(config: ModelConfig, positions: int) -> int:
    """Logits of `positions` positions."""
    return 2 * positions * config.d_model * config.vocab_size


def encode_flops(config: ModelConfig, prefix: int, boundary: int, attention: float = 1.0) -> float:
    """Encoding of a prefix alone: layers below the boundary, and K and V of the layer at the boundary."""
    if not prefix:
        return 0
    boundary = clamp_boundary(boundary, config.num_layers)
    return boundary * layer_flops(config, prefix, prefix, attention) + kv_flops(config, prefix)


def pass_flops(
    config: ModelConfig,
    job: Job,
    span: int,
    *,
    refresh: bool,
    published: bool,
    keys: int | None = None,
    attention: float = 1.0,
) -> float:
    """A step that runs `span` suffix tokens, plus the deep prefix KV if it refreshes them; without the head.

    They attend to `keys` tokens; None: to the whole sequence. `attention` as in `layer_flops`.

    The published algorithm runs whole layers `b..L-1` over the prefix. This library skips three parts that do not
    change a token: K and V of layer b, its queries except for one row per prefix, and in layer L - 1 everything except
    K and V.
    """
    total, deep = job.prefix + job.suffix, config.num_layers - job.boundary
    suffix = float(config.num_layers * layer_flops(config, span, total if keys is None else keys, attention))
    if not refresh or deep <= 0 or (deep == 1 and not published):
        return suffix
    whole = suffix + deep * layer_flops(config, job.prefix, total, attention)
    if published:
        return whole
    saved_at_boundary = kv_flops(config, job.prefix) + query_flops(config, job.prefix) * (1 - 1 / job.rows_per_prefix)
    saved_at_top = layer_flops(config, job.prefix, total, attention) - kv_flops(config, job.prefix)
    return whole - saved_at_boundary - saved_at_top


def _encoding(config: ModelConfig, job: Job, *, published: bool, attention: float = 1.0) -> float:
    """A row's share of the cost of encoding its prefix."""
    boundary = config.num_layers if published else job.boundary
    return encode_flops(config, job.prefix, boundary, attention) / job.rows_per_prefix


def row_flops(config: ModelConfig, job: Job, *, published: bool = False) -> float:
    """The whole run of a row, including its share of encoding the prefix.

    Args:
        config: the architecture.
        job: the run.
        published: count the algorithm as published instead of what this library runs.

    Returns:
        Floating-point operations.
    """
    steps = sum(
        count * pass_flops(config, job, kind.span, refresh=kind.refresh, published=published, keys=kind.keys)
        for kind, count in job.passes().items()
    )
    return steps + job.steps * head_flops(config, job.block) + _encoding(config, job, published=published)


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of the parameters that a step reads: all layers, with all of their experts, and the head.

    Weights in 8 bits have one each, whatever `itemsize` is; norms, routers and scales are left out.
    """
    itemsize = itemsize if config.quantize == "none" else 1
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    layer = config.d_model * (heads + 3 * config.mlp_weights)
    return round(itemsize * (config.num_layers * layer + config.vocab_size * config.d_model))


def summed_bytes(config: ModelConfig, job: Job, span: int, *, refresh: bool, itemsize: int) -> int:
    """Bytes of a row's hidden states that a pass sums over the devices of a model that is split (`mesh: model=M`).

    Each layer sums its attention's and its MLP's output, and the embedding is summed once; in a refresh the prefix is
    among the tokens from the boundary's layer up to the last but one.

    Args:
        config: the architecture.
        job: the row's run.
        span: suffix tokens that the pass runs.
        refresh: whether it refreshes the deep prefix KV.
        itemsize: bytes per number.
    """
    tokens = span + 2 * config.num_layers * span
    if refresh:
        tokens += 2 * max(0, config.num_layers - 1 - job.boundary) * job.prefix
    return tokens * config.d_model * itemsize


def batch_seconds(
    config: ModelConfig,
    job: Job,
    rows: int,
    *,
    peak: float,
    attention: float = 1.0,
    bandwidth: float = math.inf,
    itemsize: int = 4,
    published: bool = True,
    sums: Callable[[float], float] = lambda nbytes: 0.0,
) -> float:
    """Lower bound of a batch's time: per step the larger of arithmetic and memory traffic, and then the links.

    Args:
        config: the architecture.
        job: the run of each row.
        rows: rows in the batch.
        peak: operations per second in products with weights.
        attention: how many of these take as long as one of attention.
        bandwidth: bytes per second; infinite: arithmetic only.
        itemsize: bytes per number.
        published: count the algorithm as published instead of what this library runs.
        sums: seconds that the devices of a split model take to sum so many bytes; nothing overlaps with it.

    Returns:
        Seconds.
    """
    kv = 2 * itemsize * config.num_kv_heads * config.head_dim * config.num_layers * (job.prefix + job.suffix)
    traffic = (weight_bytes(config, itemsize) + rows * kv) / bandwidth
    head = head_flops(config, job.block)
    seconds = rows * _encoding(config, job, published=published, attention=attention) / peak
    for (refresh, span, keys), count in job.passes().items():
        flops = head + pass_flops(
            config, job, span, refresh=refresh, published=published, keys=keys, attention=attention
        )
        seconds += count * max(rows * flops / peak, traffic)
        seconds += count * sums(rows * summed_bytes(config, job, span, refresh=refresh, itemsize=itemsize))
    return seconds


def gain_limit(
    config: ModelConfig, job: Job, rows: int = 1, *, peak: float = 1.0, bandwidth: float = math.inf, itemsize: int = 4
) -> float:
    """Upper bound of the published algorithm's speed-up over no cache for this job; see `batch_seconds`."""

    def seconds(job: Job) -> float:
        return batch_seconds(config, job, rows, peak=peak, bandwidth=bandwidth, itemsize=itemsize)

    return seconds(job.without_prefix()) / seconds(job)
