"""Matmul precision for each dtype, the dtype of activations, the unit of the residual stream, sums over mesh axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: Any) -> jax.lax.Precision:
    """Matmul precision of a dtype: float32 is float32 everywhere (GPUs and TPUs would round inputs otherwise)."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def activation_dtype(params: Any) -> Any:
    """Dtype of activations and caches: the smallest floating-point one of the parameters.

    Scales of 8-bit weights are float32 whatever it is.
    """
    found = {leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return min(found, key=lambda dtype: (dtype.itemsize, dtype.name))


def residual_unit(dtype: Any) -> float:
    """What the residual stream is multiplied with, all of it; 1 but in float16.

    A few features of large models grow far beyond what the others are, and float16 ends at 65,504. In units of 64 it
    reaches to four million, with as many bits for every number that is not tiny. Norms undo it; what is added to the
    stream is brought to the same unit before it is rounded (`bicache_jax.models.linear.swiglu`).
    """
    return 2.0**-6 if jnp.dtype(dtype) == jnp.float16 else 1.0


def psum(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over a mesh axis; `x` itself without an axis."""
    return x if axis is None else jax.lax.psum(x, axis)
