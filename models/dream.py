"""Dream (arXiv 2508.15487): Dream-7B, Dream-Coder, DiffuCoder. Qwen2 blocks; logits at j - 1 predict position j."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bicache_jax.checkpoints.fields import Fields, TensorMap
from bicache_jax.core.config import ModelConfig
from bicache_jax.models.llama_names import block_from_hf, block_names

MODEL_TYPES = ("dream",)
PUBLISHED_MASK_ID = 151666

# Settings of its published loop (`generation_utils.py` of the checkpoints); fields of `ModelConfig`.
LOOP: Mapping[str, Any] = {
    "shift_logits": True,
    "anchor_blocks": True,
    "remasking": "entropy",
    "schedule": "time",
    "time_eps": 1e-3,
    "tempered_confidence": True,
}

# Fields of the published configs that do not change any result.
_HARMLESS = (
    # unused while use_sliding_window is off
    "sliding_window",
    "max_window_layers",
    # known from the tensor names
    "attention_bias",
)


def config_from_hf(fields: Mapping[str, Any], names: frozenset[str], source: str) -> ModelConfig:
    """Reads a `config.json`; same arguments and errors as `bicache_jax.models.llada.config_from_hf`."""
    file = Fields(fields, source)
    config = ModelConfig(
        family="dream",
        **block_from_hf(file, names, max_length=32768),
        mask_id=file.read("mask_token_id", int, default=PUBLISHED_MASK_ID, least=0),
        **LOOP,
    )
    file.check_rest(_HARMLESS)
    return config


def tensor_map(config: ModelConfig) -> TensorMap:
    """Checkpoint name of every parameter."""
    return block_names(config)
