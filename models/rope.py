"""Rotary position embedding in float32 (RoFormer, arXiv 2104.09864), in the rotate-half form of the checkpoints."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x_bnth: Float[Array, "B n T H"], positions_bt: Int[Array, "B T"], theta: float) -> Float[Array, "B n T H"]:
    """Rotates queries or keys to their positions.

    Angles and products are float32 for every dtype of `x_bnth`: bfloat16 would round position 257 to 256.
    """
    half = x_bnth.shape[-1] // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_b1th = positions_bt[:, None, :, None].astype(jnp.float32) * frequency_h
    cos, sin = jnp.cos(angle_b1th), jnp.sin(angle_b1th)
    first, second = jnp.split(x_bnth.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_bnth.dtype)
