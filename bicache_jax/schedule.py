"""How many tokens each step unmasks, worked out on the host: the device program only reads the counts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from bicache_jax.cache import Decoding
from bicache_jax.config import REMASKING, BlockCache, ModelConfig, Remasking, SamplingConfig

_OWN_RULE: dict[str, Remasking] = {"llada": "low_confidence", "dream": "entropy"}


def even_counts(masks: int, steps: int) -> np.ndarray:
    """LLaDA's schedule (`get_num_transfer_tokens`): `masks // steps` a step, one more in the first `masks % steps`."""
    return masks // steps + (np.arange(steps) < masks % steps)


def time_counts(masks: int, steps: int, *, anchored: bool, eps: float = 1e-3) -> np.ndarray:
    """Dream's schedule: `int(left * (1 - s / t))` with t, s from `linspace(1, eps, steps + 1)`, at the last step all.

    Args:
        masks: masked tokens of the block.
        steps: its denoising steps.
        anchored: the first step fixes one token and the others go on from step 1 (Fast-dLLM's loop for Dream).
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


def window_size(sampling: SamplingConfig, block_cache: BlockCache, block: int) -> int:
    """Tokens that steps inside block number `block` run under a block cache; 0 without one."""
    if block_cache == "off":
        return 0
    return sampling.block_size if block_cache == "dual" else sampling.gen_length - block * sampling.block_size


def stages(sampling: SamplingConfig, block_cache: BlockCache) -> list[tuple[int, int]]:
    """The dispatches of a run: (tokens that steps inside a block run, the block at which that number changes)."""
    windows = [window_size(sampling, block_cache, block) for block in range(sampling.num_blocks)]
    ends = {window: block + 1 for block, window in enumerate(windows)}
    return list(ends.items())


def most_steps(sampling: SamplingConfig) -> int:
    """Most denoising steps a row can take."""
    return sampling.num_steps if sampling.threshold is None else sampling.gen_length


def make_decoding(
    config: ModelConfig,
    sampling: SamplingConfig,
    boundary: Any,
    refresh_interval: Any,
    *,
    block_cache: BlockCache = "off",
    room: int = 0,
) -> Decoding:
    """The traced values of a batch.

    Args:
        config: the architecture.
        sampling: decoding settings.
        boundary: b.
        refresh_interval: N.
        block_cache: the block cache in use.
        room: least number of entries of `counts`; a bucket, so that other step counts need no other program.

    Returns:
        What the rows share.
    """
    block_steps = sampling.num_steps // sampling.num_blocks
    anchored = config.shift_logits and block_cache != "off"
    if config.family == "dream":
        counts = time_counts(sampling.block_size, block_steps, anchored=anchored)
    else:
        counts = even_counts(sampling.block_size, block_steps)
    return Decoding(
        boundary=jnp.asarray(boundary, jnp.int32),
        refresh_interval=jnp.asarray(refresh_interval, jnp.int32),
        num_blocks=jnp.asarray(sampling.num_blocks, jnp.int32),
        block_length=jnp.asarray(sampling.block_size, jnp.int32),
        block_steps=jnp.asarray(block_steps, jnp.int32),
        counts=jnp.asarray(np.pad(counts, (0, max(0, room - block_steps))), jnp.int32),
        scale=jnp.asarray(1.0, jnp.float32),
        noise=jnp.asarray(sampling.temperature, jnp.float32),
        remasking=jnp.asarray(REMASKING.index(sampling.remasking or _OWN_RULE[config.family]), jnp.int32),
        threshold=jnp.asarray(jnp.inf if sampling.threshold is None else sampling.threshold, jnp.float32),
        anchor=jnp.asarray(anchored),
        dual=jnp.asarray(block_cache == "dual"),
    )
