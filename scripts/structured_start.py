"""Initial parameters of the example model.

From a usual random start such a model only guesses some value of the document for thousands of steps. So it has a
*structured* start, described here. Everything is trained afterwards, and the checkpoint is an ordinary LLaDA.

* Embeddings are normal plus one vector that all tokens share. The mask token is that vector plus a vector of its own
  that nothing reads. The head is the transposed token part.
* Queries and keys of layers 0 and 1 point along the shared vector, so that rotary embedding turns them into sharp
  heads at fixed offsets: the words just before each word, each kept in a quarter of the dimensions.
* In later layers, heads compare one such quarter, in dimensions that rotary embedding hardly rotates, so that words
  after the same words attend to each other across a document. They copy another quarter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax.core.config import ModelConfig
from bicache_jax.example import task
from bicache_jax.models import init

# For the heads of layers 0 and 1: offset, the quarter of the content that they keep, and its gain.
OFFSETS = (
    ((-1, 0, 1.0), (-2, 1, 1.0), (-3, 2, 1.0), (1, 3, 0.5)),
    ((-4, 3, 1.0), (-5, 0, 0.1), (2, 1, 0.1), (3, 2, 0.1)),
)


def at_offset(offset: int, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """A query and a key [H] that are equal after rotation if the key is `offset` tokens later."""
    angle = offset * config.rope_theta ** (-np.arange(config.head_dim // 2) / (config.head_dim // 2))
    key = np.concatenate([np.ones(config.head_dim // 2), np.zeros(config.head_dim // 2)])
    return np.concatenate([np.cos(angle), np.sin(angle)]), key


def slow_dimensions(config: ModelConfig) -> np.ndarray:
    """Which dimensions of a head [H] hardly rotate within a document, so that content can be compared in them."""
    return np.tile(np.arange(config.head_dim // 2) >= 5, 2)


def structured_start(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Parameters to start from; see the module's docstring."""
    rng = np.random.default_rng(seed)
    params: Any = jax.tree.map(np.array, init(config, jax.random.key(seed)))
    width, head, layers = config.d_model, config.head_dim, params["layers"]

    def orthogonal() -> np.ndarray:
        return np.linalg.qr(rng.normal(size=(width, width)))[0]

    shared = rng.normal(size=width)
    shared *= 0.5 * np.sqrt(width) / np.linalg.norm(shared)
    direction = shared / np.linalg.norm(shared)
    blank = rng.normal(size=width)
    blank -= blank @ direction * direction
    blank /= np.linalg.norm(blank)
    away = np.eye(width) - np.outer(direction, direction) - np.outer(blank, blank)
    tokens = rng.normal(size=(config.vocab_size, width)) * 0.5 @ away
    for relation in task.RELATIONS:  # a question's verb starts similar to the statement's
        said, asked = task.TOKEN_ID[relation.verb[0]], task.TOKEN_ID[relation.ends[0]]
        tokens[asked] = 0.8 * tokens[said] + 0.6 * tokens[asked]
    tokens *= 0.5 * np.sqrt(width) / np.linalg.norm(tokens, axis=1, keepdims=True)
    tokens[config.mask_id] = 0
    params["embed"] = tokens + shared
    # The same norm as any other token.
    params["embed"][config.mask_id] += blank * 0.5 * np.sqrt(width)
    params["head"] = tokens / (0.25 * np.sqrt(width)) * 0.5

    parts = [part @ away for part in orthogonal().reshape(config.num_heads, head, width)]
    slow = slow_dimensions(config)

    def noise(scale: float) -> np.ndarray:
        return scale * rng.normal(size=(width, head)) / np.sqrt(width)

    for layer in range(config.num_layers):
        queries, keys, values, outputs = [], [], [], []
        for index in range(config.num_heads):
            if layer < len(OFFSETS):  # look at a fixed offset, keep a part of that token
                offset, kept, gain = OFFSETS[layer][index]
                query, key = at_offset(offset, config)
                queries.append(np.outer(direction, query) * 0.92 + noise(0.2))
                keys.append(np.outer(direction, key) * 0.92 + noise(0.2))
            else:  # look for equal content in one part, copy another part of that token
                kept, gain = (index + layer) % config.num_heads, 0.4
                turn = np.linalg.qr(rng.normal(size=(head, head)))[0] * slow * 1.8
                queries.append(parts[index].T @ turn + noise(0.2))
                keys.append(parts[index].T @ turn + noise(0.2))
            values.append(parts[kept].T)
            outputs.append(parts[kept] * gain)
        for name, stack in (("q", queries), ("k", keys), ("v", values)):
            layers[name]["weight"][layer] = np.concatenate(stack, axis=1).T
        layers["o"]["kernel"][layer] = np.concatenate(outputs, axis=0)
        layers["down"]["kernel"][layer] = 0
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
