"""A mixture of experts in place of the MLP: every token runs through the few experts that its router picks.

No expert has a capacity and no token is dropped, so what a token gets depends on that token alone, whoever else is in
the batch. Tokens are sorted by expert. TPUs multiply them by `jax.lax.ragged_dot`, which reads each expert's weights
once. Elsewhere that multiplies every token by every expert (64 experts on a CPU: 50 times the work, measured), so there
they go through tiles of one expert's tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bicache_jax.core.axes import vary_like
from bicache_jax.core.config import Experts, ModelConfig, Quantize
from bicache_jax.core.numerics import precision
from bicache_jax.core.quantized import product, quantise
from bicache_jax.models.linear import Linear

TILE = 32
"""Tokens of one expert that are multiplied at a time, where it is not TPUs that do it."""


class Router(nnx.Module):
    """Scores of the experts for a token, and the bias with which they are picked."""

    def __init__(self, experts: Experts, d_model: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialises the weight, stored as `[out, in]`, like other weights, and the bias to zero."""
        weight = jax.random.normal(rngs.params(), (experts.num, d_model), dtype)
        self.weight = nnx.Param(weight * jnp.asarray(d_model**-0.5, dtype))
        self.bias = nnx.Param(jnp.zeros((experts.num,), dtype)) if experts.bias else None


class Stack(nnx.Module):
    """The same projection of all experts."""

    def __init__(
        self, num: int, features_in: int, features_out: int, *, quantize: Quantize, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Initialises the weights."""
        kernel: Any = jax.random.normal(rngs.params(), (num, features_in, features_out), dtype)
        kernel *= jnp.asarray(features_in**-0.5, dtype)
        scale = None
        if quantize != "none":
            kernel, scale = quantise(kernel, 1)
        self.scale = None if scale is None else nnx.Param(scale)
        self.kernel = nnx.Param(kernel)


class Mixture(nnx.Module):
    """The parameters of one layer's mixture."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialises them in `dtype`."""
        experts, d_model = config.experts, config.d_model
        assert experts is not None
        self.router = Router(experts, d_model, dtype=dtype, rngs=rngs)
        wide, narrow = (experts.here, d_model, experts.d_expert), (experts.here, experts.d_expert, d_model)
        settings: Any = {"quantize": config.quantize, "dtype": dtype, "rngs": rngs}
        self.gate, self.up, self.down = (Stack(*size, **settings) for size in (wide, wide, narrow))
        if experts.d_shared:
            self.shared_gate, self.shared_up, self.shared_down = (
                Linear(*size, bias=False, **settings)
                for size in ((d_model, experts.d_shared),) * 2 + ((experts.d_shared, d_model),)
            )


def route(experts: Experts, router: Any, x_md: Float[Array, "M D"]) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
    """The experts of each token, and how much each counts; all in float32.

    Args:
        experts: how they are picked.
        router: `weight` [E, D], and a `bias` [E] if it has one.
        x_md: normalised tokens.

    Returns:
        Experts, the best first (among equals the lower one), and their weights.
    """
    high = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("md,ed->me", x_md.astype(jnp.float32), router["weight"].astype(jnp.float32), precision=high)
    scores = jax.nn.sigmoid(logits) if experts.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    picked = scores + router["bias"].astype(jnp.float32) if experts.bias else scores
    if experts.groups > 1:  # only those of the groups whose two best experts are the best together
        grouped = picked.reshape(len(picked), experts.groups, -1)
        of_group = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
        _, best = jax.lax.top_k(of_group, experts.top_groups)
        allowed = jnp.any(jnp.arange(experts.groups) == best[..., None], axis=1)
        picked = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(picked.shape)
    _, chosen = jax.lax.top_k(picked, experts.per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.renormalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * experts.scale


def mix(
    config: ModelConfig, layers: Any, layer: Int[Array, ""], x_md: Float[Array, "M D"], *, axis: str | None = None
) -> Float[Array, "M D"]:
    """A layer's experts and shared experts, for normalised tokens; on a shard, its part of the sum.

    Args:
        config: the architecture: how experts are picked, and the format of their weights.
        layers: parameters of `Mixture`, stacked over layers.
        layer: which of them.
        x_md: the tokens.
        axis: mesh axis over which the experts, or the columns of each, are split; None: they are not split.
    """
    experts = config.experts
    assert experts is not None

    def here(leaf: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

    chosen, weights = route(experts, jax.tree.map(here, layers["router"]), x_md)
    whole = experts.cut == "expert"
    if whole and axis is not None:  # counted from the first that is here; those of other shards come last
        own = chosen - jax.lax.axis_index(axis) * experts.here
        here_mk = (own >= 0) & (own < experts.here)
        chosen, weights = jnp.where(here_mk, own, experts.here), jnp.where(here_mk, weights, 0)
    order = jnp.argsort(chosen.ravel(), stable=True)  # so that each expert's tokens are neighbours
    sizes = jnp.sum(chosen.reshape(-1, 1) == jnp.arange(experts.here), axis=0, dtype=jnp.int32)
    sorted_nd = x_md[order // experts.per_token]
    stacks = [layers[name] for name in ("gate", "up", "down")]
    tiles = functools.partial(_tiles, quantize=config.quantize, axis=None if whole else axis)
    if config.quantize == "none":
        out_nd = jax.lax.platform_dependent(sorted_nd, sizes, layer, *stacks, default=tiles, tpu=_ragged)
    else:  # a ragged product of 8-bit weights with floats would need a copy of all of them as floats
        out_nd = tiles(sorted_nd, sizes, layer, *stacks)
    mine = (jnp.arange(len(order)) < jnp.sum(sizes))[:, None]  # behind them nothing was written
    out_mkd = jnp.where(mine, out_nd, 0)[jnp.argsort(order)].reshape(*chosen.shape, -1)
    out = jnp.einsum("mkd,mk->md", out_mkd.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)
    out = out.astype(x_md.dtype)
    if experts.d_shared:
        gate, up, down = (jax.tree.map(here, layers[f"shared_{name}"]) for name in ("gate", "up", "down"))
        out = out + _swiglu(x_md, gate, up, down, quantize=config.quantize, axis=axis)
    return out


def _swiglu(x: Array, gate: Any, up: Any, down: Any, *, quantize: Quantize, axis: str | None) -> Array:
    def times(x: Array, part: Any, axis: str | None = None) -> Array:
        return product(x, part["kernel"], part.get("scale"), quantize=quantize, axis=axis)

    return times(jax.nn.silu(times(x, gate)) * times(x, up), down, axis)


def _ragged(x_nd: Array, sizes: Array, layer: Array, gate: Any, up: Any, down: Any) -> Float[Array, "n D"]:
    """SwiGLU of tokens sorted by expert, `sizes` of each."""
    high = precision(x_nd.dtype)
    # The experts of all layers are groups, those of the others empty: to cut a layer out would copy it.
    layers, experts = gate["kernel"].shape[:2]
    groups = jax.lax.dynamic_update_slice(jnp.zeros(layers * experts, jnp.int32), sizes, (layer * experts,))

    def times(x: Array, stack: Any) -> Array:
        kernels = stack["kernel"]
        return jax.lax.ragged_dot(x, kernels.reshape(-1, *kernels.shape[2:]), groups, precision=high)

    return times(jax.nn.silu(times(x_nd, gate)) * times(x_nd, up), down)


def _tiles(
    x_nd: Array,
    sizes: Array,
    layer: Array,
    gate: Any,
    up: Any,
    down: Any,
    *,
    quantize: Quantize = "none",
    axis: str | None = None,
) -> Float[Array, "n D"]:
    """The same, tile by tile; the last tile of an expert reaches into the next one's tokens, and leaves them alone."""
    count = x_nd.shape[0]
    tile = min(TILE, count)
    tiles = -(-sizes // tile)
    ends, tile_ends = jnp.cumsum(sizes), jnp.cumsum(tiles)
    padded = jnp.pad(x_nd, ((0, tile), (0, 0)))

    def one(index: Array, out: Array) -> Array:
        expert = jnp.searchsorted(tile_ends, index, side="right").astype(jnp.int32)
        start = ends[expert] - sizes[expert] + (index - tile_ends[expert] + tiles[expert]) * tile

        def own(leaf: Array) -> Array:
            at: list[Any] = [layer, expert, *[0] * (leaf.ndim - 2)]
            return jax.lax.dynamic_slice(leaf, at, (1, 1, *leaf.shape[2:]))[0, 0]

        x = jax.lax.dynamic_slice_in_dim(padded, start, tile)
        parts = (jax.tree.map(own, stack) for stack in (gate, up, down))
        made = _swiglu(x, *parts, quantize=quantize, axis=axis)
        mine = (start + jnp.arange(tile) < ends[expert])[:, None]
        return jax.lax.dynamic_update_slice_in_dim(
            out, jnp.where(mine, made, jax.lax.dynamic_slice_in_dim(out, start, tile)), start, 0
        )

    out = vary_like(jnp.zeros_like(padded), (x_nd, gate))
    return jax.lax.fori_loop(0, tile_ends[-1], one, out)[:count]
