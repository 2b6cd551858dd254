"""Every variant of architecture and storage that the published configs allow, against a forward pass in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bicache_jax import CacheConfig, Engine, SamplingConfig, forward, load_model

LLADA_NAMES = {
    "embed": "model.transformer.wte", "block": "model.transformer.blocks.{}.", "norm1": "attn_norm", "norm2": "ff_norm",
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
    "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
}  # fmt: skip
DREAM_NAMES = {
    "embed": "model.embed_tokens", "block": "model.layers.{}.", "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "norm": "model.norm", "head": "lm_head",
}  # fmt: skip


def numpy_logits(
    tensors: dict[str, np.ndarray], names: dict[str, str], ids: list[int], *, heads: int, layers: int, eps: float
) -> np.ndarray:
    """A bidirectional pre-norm transformer in float64, straight from the checkpoint's names."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * t[f"{name}.weight"] + t.get(f"{name}.bias", 0.0)

    def heads_of(x: np.ndarray, size: int) -> np.ndarray:
        return x.reshape(len(x), -1, size).transpose(1, 0, 2)

    def rotated(x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None] / 1e4 ** (np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = t[f"{names['embed']}.weight"][ids]
    for layer in range(layers):
        part = {
            key: names["block"].format(layer) + names[key] for key in ("norm1", "norm2", *"qkvo", "gate", "up", "down")
        }
        y = norm(x, part["norm1"])
        size = t[f"{part['q']}.weight"].shape[0] // heads
        q, k = (rotated(heads_of(linear(y, part[key]), size)) for key in "qk")
        v = heads_of(linear(y, part["v"]), size)
        k, v = (np.repeat(a, heads // len(a), axis=0) for a in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(size)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.transpose(1, 0, 2).reshape(len(x), -1), part["o"])
        y = norm(x, part["norm2"])
        gate = linear(y, part["gate"])
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, part["up"]), part["down"])
    head = names["head"] if f"{names['head']}.weight" in t else names["embed"]
    return linear(norm(x, names["norm"]), head)


LLADA_VARIANTS: dict[str, dict[str, Any]] = {
    "grouped heads": {"n_kv_heads": 2},
    "one key head": {"n_kv_heads": None, "multi_query_attention": True},
    "query biases": {"include_qkv_bias": True},
    "all biases": {"include_bias": True, "n_kv_heads": 2},
    "tied": {"weight_tying": True, "n_kv_heads": 1},
    "padded vocabulary": {"vocab_size": 101, "embedding_size": 128},
    "defaults": {"embedding_size": None, "mlp_hidden_size": None, "n_kv_heads": None},
}


@pytest.mark.parametrize("fields", LLADA_VARIANTS.values(), ids=LLADA_VARIANTS)
def test_llada_variants(tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = checkpoint_files.LLADA | fields
    kv_heads = 1 if fields.get("multi_query_attention") else fields["n_kv_heads"]
    tensors = checkpoint_files.llada_tensors(fields | {"n_kv_heads": kv_heads}, seed=1)
    model = load_model(checkpoint_files.write(tmp_path, fields, tensors, shards=3), dtype="float32")
    ids = [5, 99, 7, 100, 100, 3, 42]
    wanted = numpy_logits(tensors, LLADA_NAMES, ids, heads=4, layers=3, eps=1e-5)
    found = forward(model.params, model.config, jnp.asarray([ids]))[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


DREAM_VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "no biases": {"num_key_value_heads": 1},
}


@pytest.mark.parametrize("fields", DREAM_VARIANTS.values(), ids=DREAM_VARIANTS)
def test_dream_variants(tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = checkpoint_files.DREAM | fields
    tensors = checkpoint_files.dream_tensors(fields, seed=2, qkv_bias=fields["num_key_value_heads"] > 1)
    model = load_model(checkpoint_files.write(tmp_path, fields, tensors, shards=2), dtype="float32")
    ids = [5, 99, 7, 100, 100, 3, 42]
    wanted = numpy_logits(tensors, DREAM_NAMES, ids, heads=4, layers=3, eps=1e-6)
    found = forward(model.params, model.config, jnp.asarray([ids]))[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_storage_dtypes_are_read_as_they_are(tmp_path: Path, dtype: Any) -> None:
    stored = checkpoint_files.llada_tensors(checkpoint_files.LLADA)
    tensors = {name: value.astype(dtype) for name, value in stored.items()}
    model = load_model(checkpoint_files.write(tmp_path, checkpoint_files.LLADA, tensors), dtype="float32")
    wanted = tensors["model.transformer.wte.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.params["embed"], wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}
    engine = Engine(model, cache=CacheConfig(boundary=1), sampling=SamplingConfig(gen_length=4))
    assert len(engine.generate([{"prompt_ids": [3, 4, 5]}])[0].token_ids) == 4
