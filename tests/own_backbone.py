"""A tiny backbone in plain JAX, right in every respect, for tests to break in one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax import ModelConfig
from bicache_jax.core.attention import prefix_attention

CONFIG = ModelConfig("own", 23, 12, 2, 4, 2, 4, 16, 100.0, 1e-5, 64, 5)


def turned(x: Any, positions: Any) -> Any:
    """Rotary embedding of [B, T, n, 4]."""
    angle = positions[..., None, None] * jnp.asarray([1.0, 0.1])
    a, b = x[..., :2], x[..., 2:]
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1
    ).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Right:
    """Attention with rotary positions and an MLP, without norms in the layers."""

    config: ModelConfig = CONFIG
    attention: Any = prefix_attention
    axis: str | None = None

    @property
    def axes(self) -> Any:
        return None

    def embed(self, params: Any, ids: Any, positions: Any) -> Any:
        return params["table"][ids]

    def query(self, layer: Any, x: Any, positions: Any) -> Any:
        return turned((x @ layer["q"]).reshape(*x.shape[:2], 4, 4), positions).swapaxes(1, 2)

    def key_value(self, layer: Any, x: Any, positions: Any) -> Any:
        k, v = ((x @ layer[name]).reshape(*x.shape[:2], 2, 4) for name in "kv")
        return turned(k, positions).swapaxes(1, 2), v.swapaxes(1, 2)

    def finish(self, layer: Any, x: Any, attended: Any) -> Any:
        x = x + attended.swapaxes(1, 2).reshape(*x.shape[:2], 16) @ layer["o"]
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"]

    def final_norm(self, params: Any, x: Any) -> Any:
        return x * params["scale"]

    def head(self, params: Any) -> Any:
        return params["table"], None, None


def init(config: ModelConfig, key: Any, dtype: Any = jnp.float32) -> Any:
    """Random parameters of `Right`."""
    layers, width = config.num_layers, config.d_model
    shapes = {"q": (width, 16), "k": (width, 8), "v": (width, 8), "o": (16, width)}
    shapes |= {"up": (width, 16), "down": (16, width)}
    keys = iter(jax.random.split(key, 8))
    return {
        "table": jax.random.normal(next(keys), (config.vocab_size, width), dtype),
        "layers": {
            name: jax.random.normal(next(keys), (layers, *shape), dtype) * 0.3 for name, shape in shapes.items()
        },
        "scale": jnp.ones((width,), dtype),
    }
