"""How many tokens each step unmasks, computed on the host; the device program only reads the counts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from bicache_jax.core.buckets import width_bucket
from bicache_jax.core.cache import Decoding, Draw
from bicache_jax.core.config import REMASKING, BlockCache, ModelConfig, SamplingConfig

TO_THE_END = 2**30
"""A block, or a number of steps, that no run reaches."""


def even_counts(masks: int, steps: int) -> np.ndarray:
    """LLaDA's schedule (`get_num_transfer_tokens`): `masks // steps` a step, one more in the first `masks % steps`."""
    return masks // steps + (np.arange(steps) < masks % steps)


def time_counts(masks: int, steps: int, *, anchored: bool, eps: float) -> np.ndarray:
    """Dream's schedule: `int(left * (1 - s / t))` with t, s from `linspace(1, eps, steps + 1)`; the last takes all.

    Args:
        masks: masked tokens in the block.
        steps: its denoising steps.
        anchored: the first step fixes one token and the schedule continues at step 1 (Fast-dLLM's loop for Dream).
        eps: time of the last step.

    Returns:
        Tokens that each step unmasks [steps].
    """
    times = np.linspace(1.0, eps, steps + 1)
    counts = np.zeros(steps, np.int32)
    left = masks
    for step in range(steps):
        share = 1.0 - times[step + 1] / times[step]
        counts[step] = left if step == steps - 1 else 1 if anchored and step == 0 else int(left * share)
        left -= counts[step]
    return counts


def linear_counts(masks: int, steps: int) -> np.ndarray:
    """A2D's schedule (its samplers): with n steps to go, the n-th part of what is left, to the nearest number.

    The share is `1 - (1 - a(s)) / (1 - a(t))` with `a(t) = 1 - t` in float32, as published: halves round as they do
    there.

    Args:
        masks: masked tokens in the block.
        steps: its denoising steps; those that would unmask nothing are left out.

    Returns:
        Tokens that each step unmasks, at most `steps` numbers, none of them 0.
    """
    counts, one = [], np.float32(1)
    for left in range(steps, 0, -1):
        s, t = (one - (one - np.float32(step / steps)) for step in (left - 1, left))
        counts.append(min(masks, round(masks * (1 - float(s / t)))))
        masks -= counts[-1]
    return np.asarray([count for count in counts if count], np.int32)


def chance_bars(steps: int, *, eps: float) -> np.ndarray:
    """The value that standard Gumbel noise must exceed to unmask a token, if chance alone decides (`origin`).

    A step from time t to s unmasks each token with probability `1 - s / t`, and the last step unmasks all. Times are
    `linspace(1, eps, steps + 1)` (Dream; with `eps=0` LLaDA, arXiv 2502.09992, algorithm 4).

    Args:
        steps: denoising steps of the block.
        eps: time of the last step.

    Returns:
        The bar of each step [steps].
    """
    times = np.linspace(1.0, eps, steps + 1)
    kept = np.append(times[1:-1] / times[:-2], 0.0)  # P(noise <= bar) = exp(-exp(-bar))
    with np.errstate(divide="ignore"):
        return -np.log(-np.log(kept))


def span_size(sampling: SamplingConfig, block_cache: BlockCache, block: int) -> int:
    """Tokens that steps inside block number `block` run with a block cache; 0 without one."""
    if block_cache == "off":
        return 0
    return sampling.block_size if block_cache == "dual" else sampling.gen_length - block * sampling.block_size


def last_block(config: ModelConfig, sampling: SamplingConfig) -> int:
    """Masks of the last block; where the prompt is part of the first one (`ModelConfig.padded_prompt`), it is whole."""
    if config.block_causal and not config.padded_prompt:
        return sampling.block_size
    return sampling.last_block_size


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps of a run that share one program. Only a block cache of the prefix kind has more than one stage.

    Attributes:
        span: tokens that steps inside a block run; 0 without a block cache.
        stop_block: the block at which the span changes or the run ends.
    """

    span: int
    stop_block: int


def pass_sizes(config: ModelConfig, sampling: SamplingConfig, span: int, length: int) -> tuple[int, ...]:
    """Tokens of a suffix that a pass may run, smallest first.

    Without a block cache that is all of it. With one, steps inside a block run its span, and those at its start
    everything. Under block-causal attention they run the block; at its start the one before it too, whose KV are
    written when it is done; and at the first block's start what is left of the prompt.

    Args:
        config: the architecture.
        sampling: decoding settings.
        span: of a `Stage`, perhaps rounded up.
        length: U.
    """
    if not span:
        return (length,)
    sizes = {span, length}
    if config.block_causal:
        block = sampling.block_size
        rest = width_bucket(length - min(sampling.gen_length, length) + block)
        sizes = {block + config.shifted, 2 * block, rest}
    return tuple(sorted({min(size, length) for size in sizes}))


def stages(sampling: SamplingConfig, block_cache: BlockCache) -> list[Stage]:
    """The stages of a run, in order."""
    if block_cache != "prefix":
        return [Stage(span_size(sampling, block_cache, 0), TO_THE_END)]
    spans = [span_size(sampling, block_cache, block) for block in range(sampling.num_blocks)]
    ends = {span: block + 1 for block, span in enumerate(spans)}
    return [Stage(span, end) for span, end in ends.items()]


def make_decoding(
    config: ModelConfig,
    sampling: SamplingConfig,
    boundary: Any,
    refresh_interval: Any,
    *,
    block_cache: BlockCache = "off",
    num_counts: int = 0,
) -> Decoding:
    """The traced values of a batch.

    Args:
        config: the architecture.
        sampling: decoding settings.
        boundary: b.
        refresh_interval: N.
        block_cache: the block cache in use.
        num_counts: smallest size of `counts`; a bucket, so that different step counts share a program.

    Returns:
        The settings that the rows share.
    """
    block_steps = sampling.block_steps
    anchored = config.anchor_blocks and block_cache != "off"
    rule = sampling.remasking or config.remasking
    counts, bars = np.zeros((2, block_steps), np.int32), np.full(block_steps, np.inf)
    if rule == "origin":
        bars = chance_bars(block_steps, eps=config.time_eps)
    else:
        for place, masks in enumerate((sampling.block_size, last_block(config, sampling))):
            if config.schedule == "time":
                made = time_counts(masks, block_steps, anchored=anchored, eps=config.time_eps)
            else:
                made = {"linear": linear_counts, "even": even_counts}[config.schedule](masks, block_steps)
            counts[place, : len(made)] = made
    padding = (0, max(0, num_counts - block_steps))
    tempered = config.tempered_confidence and sampling.temperature > 0
    draw = Draw(
        scale=jnp.asarray(1 / sampling.temperature if tempered else 1.0, jnp.float32),
        noise=jnp.asarray(1.0 if tempered else sampling.temperature, jnp.float32),
        top_p=jnp.asarray(sampling.top_p or 1.0, jnp.float32),
        top_k=jnp.asarray(min(sampling.top_k or config.vocab_size, config.vocab_size), jnp.int32),
        guidance=jnp.asarray(1.0 + sampling.cfg_scale, jnp.float32),
        suppressed=jnp.asarray(sampling.suppress_tokens, jnp.int32),
        ban_eos=jnp.asarray(sampling.logits_eos_inf),
        defer_eos=jnp.asarray(sampling.confidence_eos_eot_inf),
    )
    threshold = sampling.threshold or (1.0 if sampling.by_confidence else jnp.inf)
    if config.block_causal:  # these loops ask for more than the threshold, the others for no less
        threshold = np.nextafter(np.float32(threshold), np.float32(jnp.inf))
    return Decoding(
        boundary=jnp.asarray(boundary, jnp.int32),
        refresh_interval=jnp.asarray(refresh_interval, jnp.int32),
        block_length=jnp.asarray(sampling.block_size, jnp.int32),
        counts=jnp.asarray(np.pad(counts, ((0, 0), padding)), jnp.int32),
        quota=jnp.asarray(config.block_causal),
        bars=jnp.asarray(np.pad(bars, padding), jnp.float32),
        draw=draw,
        remasking=jnp.asarray(REMASKING.index(rule), jnp.int32),
        alg_temperature=jnp.asarray(sampling.alg_temperature, jnp.float32),
        threshold=jnp.asarray(threshold, jnp.float32),
        factor=jnp.asarray(sampling.factor or 0.0, jnp.float32),
        entropy_bound=jnp.asarray(sampling.entropy_bound or jnp.inf, jnp.float32),
        editing=jnp.asarray(jnp.inf if sampling.editing_threshold is None else sampling.editing_threshold, jnp.float32),
        early_stop=jnp.asarray(sampling.early_stop),
        anchor=jnp.asarray(anchored),
        dual=jnp.asarray(block_cache == "dual"),
    )


def passes_saved(sampling: SamplingConfig, blocks: int) -> int:
    """Forward passes saved by a row that stopped early; a lower bound if confidence decides the number of passes.

    Args:
        sampling: its settings.
        blocks: number of blocks that it finished.
    """
    skipped = sampling.num_blocks - blocks
    return skipped * (1 if sampling.by_confidence else sampling.block_steps)
