"""Weights and activations in 8 bits, and products with them.

`w8` keeps weights in int8 with a scale for every output channel, and multiplies in the dtype of the activations: half
the memory. `w8a8` also brings each token's activations to int8, with a scale of its own, so that products are of
integers and their sums exact: half the memory and, where a device multiplies int8 faster, less time. A token's scale
depends on that token alone, so what it gets does not depend on its neighbours.

[qwix](https://github.com/google/qwix) would do most of this (tried with 0.1.8). Its rules go by module path and hold
for a block that is split once and merged inside `fori_loop`, and its products are of integers, too. It is not used for
three reasons. It calibrates what a device holds: where a projection's inputs are split over a mesh, a token gets a
scale on every device, and its result depends on the mesh; here they agree on one (`axis`). Its scales have the weights'
dtype, in bfloat16 eight bits of it; here they are float32. And a quantised leaf is a tree of its own, whereas loading,
partition tables, checkpoints and fingerprints here know a parameter by its path. What it would replace are the
functions of this file; it has no kernels of its own for these products.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from bicache_jax.core.config import Quantize
from bicache_jax.core.numerics import precision

MOST = 127
"""Largest magnitude of an 8-bit weight or activation; -128 is not used, so that both signs round alike."""


def quantise(weight: Float[Array, "..."], axis: int) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Weights in 8 bits, and their scales: the largest magnitude along the inputs becomes `MOST`.

    Args:
        weight: weights of any number of maps.
        axis: the axis of the inputs.

    Returns:
        The integers, and the scale of each output channel (the weights' shape without `axis`).
    """
    exact = weight.astype(jnp.float32)
    peak = jnp.max(jnp.abs(exact), axis=axis, keepdims=True)
    scale = _scale(peak)
    return jnp.round(exact / scale).astype(jnp.int8), jnp.squeeze(scale, axis)


def _scale(peak: Float[Array, "..."]) -> Float[Array, "..."]:
    """The scale of what is at most `peak`. That of NaN is NaN: integers have none, and it must not get lost."""
    return jnp.where(peak == 0, 1, peak / MOST)


def in_8_bits(x: Float[Array, "*B D"], axis: str | None = None) -> tuple[Int8[Array, "*B D"], Float[Array, "*B 1"]]:
    """Activations in 8 bits, each token with a scale of its own.

    Args:
        x: the activations.
        axis: mesh axis over which their features are split; the shards then agree on the scale.
    """
    exact = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(exact), axis=-1, keepdims=True)
    peak = peak if axis is None else jax.lax.pmax(peak, axis)
    scale = _scale(peak)
    return jnp.round(exact / scale).astype(jnp.int8), scale


def product(
    x: Float[Array, "*B D"],
    weight: Array,
    scale: Float[Array, " N"] | None,
    *,
    out_first: bool = False,
    quantize: Quantize = "none",
    axis: str | None = None,
    dtype: Any = None,
) -> Float[Array, "*B N"]:
    """A linear map of the last axis.

    Args:
        x: its input.
        weight: `[in, out]`, or `[out, in]` with `out_first`.
        scale: of each output channel of 8-bit weights; None: these are floats.
        out_first: see there.
        quantize: how 8-bit weights are multiplied (static).
        axis: mesh axis over which the inputs are split, where `w8a8` has to know it.
        dtype: of the result; None: the input's.

    Returns:
        The outputs; where the inputs are split, this shard's part of their sum.
    """
    dtype = x.dtype if dtype is None else dtype
    equation = "...d,nd->...n" if out_first else "...d,dn->...n"
    if scale is None:
        out = jnp.einsum(equation, x, weight, precision=precision(x.dtype), preferred_element_type=dtype)
        return out
    if quantize == "w8a8":
        x8, of_token = in_8_bits(x, axis)
        sums = jnp.einsum(equation, x8, weight, preferred_element_type=jnp.int32)
        return (sums.astype(jnp.float32) * of_token * scale).astype(dtype)
    sums = jnp.einsum(
        equation, x, weight.astype(x.dtype), precision=precision(x.dtype), preferred_element_type=jnp.float32
    )
    return (sums * scale).astype(dtype)
