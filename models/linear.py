"""Linear maps, plain or with 8-bit weights (`bicache_jax.core.quantized`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bicache_jax.core.config import Quantize
from bicache_jax.core.numerics import residual_unit
from bicache_jax.core.quantized import product, quantise


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """The activation of an MLP or expert, in the unit of the residual stream, to which it is projected."""
    unit = residual_unit(gate.dtype)
    if unit == 1:
        return jax.nn.silu(gate) * up
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32) * unit).astype(gate.dtype)


class Linear(nnx.Module):
    """A linear map with its weight as `[in, out]`, called `kernel`, or as in checkpoints `[out, in]`, called `weight`.

    To heads it is the latter: with it TPUs produce `[B, N, T, H]` directly. With `[in, out]` they would first change
    its memory layout, in every layer of every step.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        bias: bool,
        quantize: Quantize,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        out_first: bool = False,
        spread: float | None = None,
    ):
        """Initialises the weight with this standard deviation (None: `features_in ** -0.5`), and the bias to zero."""
        shape = (features_out, features_in) if out_first else (features_in, features_out)
        spread = features_in**-0.5 if spread is None else spread
        weight: Any = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(spread, dtype)
        self.quantize, self.out_first = quantize, out_first
        scale = None
        if quantize != "none":
            weight, scale = quantise(weight, int(out_first))
        self.scale = None if scale is None else nnx.Param(scale)
        if out_first:
            self.weight = nnx.Param(weight)
        else:
            self.kernel = nnx.Param(weight)
        self.bias = nnx.Param(jnp.zeros((features_out,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B D"], axis: str | None = None) -> Float[Array, "*B N"]:
        """Maps the last axis and adds the bias; `axis`: the mesh axis that inputs are split over, as in `product`."""
        weight = self.weight if self.out_first else self.kernel
        out = product(
            x,
            weight[...],
            None if self.scale is None else self.scale[...],
            out_first=self.out_first,
            quantize=self.quantize,
            axis=axis,
        )
        return out if self.bias is None else out + self.bias[...]
