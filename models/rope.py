"""Rotary position embedding in float32 (RoFormer, arXiv 2104.09864), in the rotate-half form of the checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x_bnth: Float[Array, "B n T H"], positions_bt: Int[Array, "B T"], theta: float, rotary_dim: int = 0
) -> Float[Array, "B n T H"]:
    """Rotates queries or keys to their positions; only the first `rotary_dim` dimensions of each head, if it is given.

    Angles and products are float32 for every dtype of `x_bnth`: bfloat16 would round position 257 to 256.
    """
    if 0 < rotary_dim < x_bnth.shape[-1]:
        turned, rest = jnp.split(x_bnth, [rotary_dim], axis=-1)
        return jnp.concatenate([rotate(turned, positions_bt, theta), rest], axis=-1)
    half = x_bnth.shape[-1] // 2
    frequency_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_b1th = positions_bt[:, None, :, None].astype(jnp.float32) * frequency_h
    cos, sin = jnp.cos(angle_b1th), jnp.sin(angle_b1th)
    return jax.lax.platform_dependent(x_bnth, cos, sin, default=by_halves, tpu=by_product)


def by_halves(
    x: Float[Array, "B n T H"], cos: Float[Array, "B 1 T h"], sin: Float[Array, "B 1 T h"]
) -> Float[Array, "B n T H"]:
    """The rotation as it is written: of the first and the second half of each head."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def by_product(
    x: Float[Array, "B n T H"], cos: Float[Array, "B 1 T h"], sin: Float[Array, "B 1 T h"]
) -> Float[Array, "B n T H"]:
    """The same numbers, the halves exchanged by a product with a permutation.

    A half of a head is half of a TPU's lanes: to cut and join halves takes passes over all queries and keys, which the
    compiler estimates at 8 % of a layer of LLaDA-8B. The matrix unit exchanges them on the way, for a third of that.
    """
    half = x.shape[-1] // 2
    exchange = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=0)
    exchanged = jnp.einsum(
        "bnth,hg->bntg", x, exchange, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return (x.astype(jnp.float32) * cos + exchanged * sin).astype(x.dtype)
