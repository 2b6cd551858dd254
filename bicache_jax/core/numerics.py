"""Matmul precision for each dtype, and sums over mesh axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: Any) -> jax.lax.Precision:
    """Matmul precision of a dtype: float32 is float32 everywhere (GPUs and TPUs would round inputs otherwise)."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def psum(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over a mesh axis; `x` itself without an axis."""
    return x if axis is None else jax.lax.psum(x, axis)
