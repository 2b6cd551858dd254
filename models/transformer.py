"""The transformer that all families share: one NNX block, stacked over layers, run by pure functions.

`Block` defines and initialises one layer. Its parameters are stacked with a leading `L` and split from the static graph
once. After that they are a plain pytree: `{"embed": [V, D], "layers": {... [L, ...]}, "norm": {...}, "head": [V, D]}`
(no `head` if it is tied to the embedding; a `head_bias` if the checkpoint has one). With a mixture of experts the MLPs
are stacks of their own, `mixture` over the layers that have one and `dense` over the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bicache_jax.core.attention import Attention
from bicache_jax.core.backbone import STACKS, LayerParams, Params
from bicache_jax.core.config import Experts, ModelConfig
from bicache_jax.core.numerics import psum
from bicache_jax.core.quantized import quantise
from bicache_jax.models.linear import Linear
from bicache_jax.models.mixture import Mixture, mix
from bicache_jax.models.rope import rotate


class Norm(nnx.Module):
    """RMSNorm as in the published code: statistics in float32, rounded before scale and bias are applied."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, size: int | None = None):
        """Initialises the scale to one and the bias, if any, to zero; `size` is the width if it is not given."""
        size = config.d_model if size is None else size
        self.epsilon = config.norm_eps
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype)) if config.norm_bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        x32 = x.astype(jnp.float32)
        x = (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)).astype(x.dtype)
        x = x * self.scale[...]
        return x if self.bias is None else x + self.bias[...]


def _linear(config: ModelConfig, features_in: int, features_out: int, **settings: Any) -> Linear:
    """A projection that is not to heads."""
    spread = config.d_model**-0.5
    return Linear(features_in, features_out, bias=config.bias, quantize=config.quantize, spread=spread, **settings)


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialises the parameters in `dtype`."""
        linear = functools.partial(_linear, config, dtype=dtype, rngs=rngs)
        self.gate, self.up = linear(config.d_model, config.d_mlp), linear(config.d_model, config.d_mlp)
        self.down = linear(config.d_mlp, config.d_model)


class Block(nnx.Module):
    """One pre-norm transformer layer: attention with rotary embedding, then a SwiGLU MLP, which may be elsewhere.

    Queries and keys may be normalised per head before they are rotated (QK-norm, as in Qwen3).
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialises the layer's parameters in `dtype`."""
        linear = functools.partial(_linear, config, dtype=dtype, rngs=rngs)
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.attention_norm = Norm(config, dtype=dtype)
        heads = functools.partial(
            Linear,
            config.d_model,
            bias=config.qkv_bias,
            quantize=config.quantize,
            dtype=dtype,
            rngs=rngs,
            out_first=True,
        )
        self.q, self.k, self.v = heads(query_size), heads(kv_size), heads(kv_size)
        if config.qk_norm:
            self.q_norm, self.k_norm = (Norm(config, dtype=dtype, size=config.head_dim) for _ in range(2))
        self.o = linear(query_size, config.d_model)
        self.mlp_norm = Norm(config, dtype=dtype)
        if config.experts is None:
            self.gate, self.up = linear(config.d_model, config.d_mlp), linear(config.d_model, config.d_mlp)
            self.down = linear(config.d_mlp, config.d_model)


AXES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("embed",): ("vocab", "width"),
    ("embed_scale",): ("vocab",),
    ("head_scale",): ("vocab",),
    ("head",): ("vocab", "width"),
    ("head_bias",): ("vocab",),
    ("norm", "scale"): ("width",),
    ("norm", "bias"): ("width",),
    **{
        ("layers", name, part): ("layer", "width")
        for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")
        for part in ("scale", "bias")
    },
    **{
        ("layers", name, part): ("layer", axis, "width") if part == "weight" else ("layer", axis)
        for name, axis in {"q": "heads", "k": "kv_heads", "v": "kv_heads"}.items()
        for part in ("weight", "bias", "scale")
    },
    **{
        (stack, name, part): ("layer", "width", "mlp") if part == "kernel" else ("layer", "mlp")
        for stack in ("layers", "dense")
        for name in ("gate", "up")
        for part in ("kernel", "bias", "scale")
    },
    **{
        (stack, name, part): ("layer", axis, "width") if part == "kernel" else ("layer", "width")
        for stack, name, axis in (("layers", "o", "heads"), ("layers", "down", "mlp"), ("dense", "down", "mlp"))
        for part in ("kernel", "bias", "scale")
    },
    ("mixture", "router", "weight"): ("layer", "expert", "width"),
    ("mixture", "router", "bias"): ("layer", "expert"),
    **{("mixture", name, "kernel"): ("layer", "expert", "width", "expert_mlp") for name in ("gate", "up")},
    ("mixture", "down", "kernel"): ("layer", "expert", "expert_mlp", "width"),
    **{("mixture", f"shared_{name}", "kernel"): ("layer", "width", "shared_mlp") for name in ("gate", "up")},
    ("mixture", "shared_down", "kernel"): ("layer", "shared_mlp", "width"),
    **{("mixture", name, "scale"): ("layer", "expert", "expert_mlp") for name in ("gate", "up")},
    ("mixture", "down", "scale"): ("layer", "expert", "width"),
    **{("mixture", f"shared_{name}", "scale"): ("layer", "shared_mlp") for name in ("gate", "up")},
    ("mixture", "shared_down", "scale"): ("layer", "width"),
}
"""Logical axes of every parameter of all families; `bicache_jax.sharding.partition.MESH_AXES` maps them to a mesh."""
_SETS = {"expert": "held_expert", "expert_mlp": "expert_width"}


@functools.lru_cache(maxsize=64)
def axes(config: ModelConfig) -> Mapping[tuple[str, ...], tuple[str, ...]]:
    """`AXES`, for an architecture whose shards may hold sets of whole experts."""
    if config.experts is None or config.experts.cut == "width":
        return AXES
    moved = (path for path in AXES if path[0] == "mixture" and path[1] in ("gate", "up", "down"))
    return {**AXES, **{path: tuple(_SETS.get(axis, axis) for axis in AXES[path]) for path in moved}}


@functools.lru_cache(maxsize=64)
def _graphs(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef[Block], nnx.GraphDef[Norm]]:
    """The static halves of a block and of the final norm."""
    block = nnx.eval_shape(lambda: Block(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return nnx.split(block)[0], nnx.split(nnx.eval_shape(lambda: Norm(config, dtype=dtype)))[0]


@functools.lru_cache(maxsize=64)
def _mlp_graph(config: ModelConfig, dtype: jnp.dtype) -> nnx.GraphDef[Mlp]:
    return nnx.split(nnx.eval_shape(lambda: Mlp(config, dtype=dtype, rngs=nnx.Rngs(0))))[0]


def init(config: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters, normal with standard deviation `D ** -0.5`."""
    dtype = jnp.dtype(dtype)
    embed_key, head_key, layer_key = jax.random.split(key, 3)

    def table(key: Array) -> Float[Array, "V D"]:
        return jax.random.normal(key, (config.vocab_size, config.d_model), dtype) * jnp.asarray(
            config.d_model**-0.5, dtype
        )

    def stack(module: type[nnx.Module], key: Array, count: int) -> LayerParams:
        def one(key: Array) -> LayerParams:
            made: nnx.Module = module(config, dtype=dtype, rngs=nnx.Rngs(key))  # type: ignore[call-arg]
            return nnx.to_pure_dict(nnx.state(made))

        return jax.vmap(one)(jax.random.split(key, count))

    params = {
        "embed": table(embed_key),
        "layers": stack(Block, layer_key, config.num_layers),
        "norm": nnx.to_pure_dict(nnx.state(Norm(config, dtype=dtype))),
    }
    if config.experts is not None:
        mixtures = len(config.mixture_layers)
        params["mixture"] = stack(Mixture, jax.random.fold_in(layer_key, 1), mixtures)
        if mixtures < config.num_layers:
            params["dense"] = stack(Mlp, jax.random.fold_in(layer_key, 2), config.num_layers - mixtures)
    if not config.tied:
        params["head"] = table(head_key)
    for name in ("embed", "head") if config.quantize != "none" else ():
        if name in params:
            params[name], params[f"{name}_scale"] = quantise(params[name], 1)
    if config.head_bias:
        params["head_bias"] = jnp.zeros((config.vocab_size,), dtype)
    return params


@dataclasses.dataclass(frozen=True)
class Transformer:
    """`bicache_jax.core.backbone.Backbone` for this block; static and hashable, without parameters.

    Attributes:
        config: the architecture, or a shard's part of it (`bicache_jax.sharding.Partition.local`).
        attention: prefix attention to use.
        axis: mesh axis over which heads, MLP and vocabulary are split; None: they are not split.
    """

    config: ModelConfig
    attention: Attention
    axis: str | None = None

    @property
    def axes(self) -> Mapping[tuple[str, ...], tuple[str, ...]]:
        """Logical axes of every parameter, by path."""
        return axes(self.config)

    def _block(self, layer: LayerParams) -> Block:
        dtype = layer["attention_norm"]["scale"].dtype
        own = {name: value for name, value in layer.items() if name not in (*STACKS, "layer")}
        return nnx.merge(_graphs(self.config, dtype)[0], nnx.State(own))

    def _sum(self, linear: Linear, x: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """A projection whose inputs are split over shards; its bias is added once."""
        if self.axis is None or linear.bias is None:
            return psum(linear(x, self.axis), self.axis)
        first = jax.lax.axis_index(self.axis) == 0
        linear.bias[...] = jnp.where(first, linear.bias[...], 0)
        return psum(linear(x, self.axis), self.axis)

    def embed(self, params: Params, ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings, summed over shards: each shard looks up its own part of the vocabulary, zeros elsewhere."""
        table, scale = params["embed"], params.get("embed_scale")
        dtype = params["norm"]["scale"].dtype

        def rows(index: Array) -> Array:
            found = table[index]
            return found if scale is None else (found * scale[index][..., None]).astype(dtype)

        if self.axis is None:
            return rows(ids)
        index = ids - jax.lax.axis_index(self.axis) * table.shape[0]
        inside = (index >= 0) & (index < table.shape[0])
        return psum(jnp.where(inside[..., None], rows(jnp.where(inside, index, 0)), 0), self.axis)

    def _heads(self, x: Array, heads: int) -> Array:
        return x.reshape(*x.shape[:2], heads, self.config.head_dim).swapaxes(1, 2)

    def query(
        self, layer: LayerParams, x_btd: Float[Array, "B T D"], positions_bt: Int[Array, "B T"]
    ) -> Float[Array, "B N T H"]:
        """Rotated queries of a layer."""
        with jax.named_scope("query"):
            block = self._block(layer)
            q = self._heads(block.q(block.attention_norm(x_btd)), self.config.num_heads)
            if self.config.qk_norm:
                q = block.q_norm(q)
            return rotate(q, positions_bt, self.config.rope_theta, self.config.rotary_dim)

    def key_value(
        self, layer: LayerParams, x_btd: Float[Array, "B T D"], positions_bt: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Rotated keys and (unrotated) values of a layer."""
        with jax.named_scope("key_value"):
            block = self._block(layer)
            normed = block.attention_norm(x_btd)
            k, v = (self._heads(project(normed), self.config.num_kv_heads) for project in (block.k, block.v))
            if self.config.qk_norm:
                k = block.k_norm(k)
            return rotate(k, positions_bt, self.config.rope_theta, self.config.rotary_dim), v

    def finish(
        self, layer: LayerParams, x_btd: Float[Array, "B T D"], attended_bnth: Float[Array, "B N T H"]
    ) -> Float[Array, "B T D"]:
        """The rest of a layer after attention: output projection, residuals, MLP."""
        with jax.named_scope("finish"):
            block = self._block(layer)
            width = self.config.num_heads * self.config.head_dim
            merged = attended_bnth.swapaxes(1, 2).reshape(*x_btd.shape[:2], width)
            x_btd = x_btd + self._sum(block.o, merged)
            normed = block.mlp_norm(x_btd)
            if self.config.experts is None:
                return x_btd + self._mlp(block, normed)
            return x_btd + self._mixed(self.config.experts, layer, normed)

    def _mlp(self, mlp: Any, normed: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """SwiGLU of the normalised residual stream."""
        return self._sum(mlp.down, jax.nn.silu(mlp.gate(normed)) * mlp.up(normed))

    def _mixed(self, experts: Experts, layer: LayerParams, normed: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The mixture of experts of a layer, or its MLP where it has one."""
        mixtures = np.asarray(self.config.mixture_layers)
        index = layer["layer"]

        def mixed() -> Array:
            slot = jnp.searchsorted(jnp.asarray(mixtures), index).astype(jnp.int32)
            flat = normed.reshape(-1, normed.shape[-1])
            mixed = mix(self.config, layer["mixture"], slot, flat, axis=self.axis)
            return psum(mixed.reshape(normed.shape), self.axis)

        def dense() -> Array:
            slot = jnp.searchsorted(jnp.asarray(experts.dense_layers), index).astype(jnp.int32)
            own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), layer["dense"])
            mlp = nnx.merge(_mlp_graph(self.config, normed.dtype), nnx.State(own))
            return self._mlp(mlp, normed)

        if not experts.dense_layers:
            return mixed()
        return jax.lax.cond(jnp.any(index == jnp.asarray(experts.dense_layers)), dense, mixed)

    def final_norm(self, params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The norm before the head."""
        return nnx.merge(_graphs(self.config, x.dtype)[1], nnx.State(params["norm"]))(x)

    def head(self, params: Params) -> tuple[Array, Float[Array, " V"] | None, Float[Array, " V"] | None]:
        """Rows of the LM head, its bias if any, and its scales in 8 bits; on a shard, its part of the vocabulary."""
        name = "embed" if self.config.tied else "head"
        return params[name], params.get("head_bias"), params.get(f"{name}_scale")
