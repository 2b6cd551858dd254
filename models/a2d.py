"""A2D (github.com/ZHZisZZ/dllm): Qwen3, Qwen2 and Llama checkpoints turned into masked diffusion models.

Qwen2's block with queries and keys normalised per head (Qwen3), or with biases (Qwen2), or with neither (Llama).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bicache_jax.checkpoints.fields import Fields, TensorMap
from bicache_jax.core.config import ModelConfig
from bicache_jax.models.llama_names import block_from_hf, block_names

MODEL_TYPES = ("a2d-qwen3", "a2d-qwen2", "a2d-llama")
PUBLISHED_MASK_ID = None  # the tokenizer names it

# Settings of its published loop (the MDLM sampler); fields of `ModelConfig`.
LOOP: Mapping[str, Any] = {
    "shift_logits": False,
    "anchor_blocks": False,
    "remasking": "low_confidence",
    "schedule": "linear",
    "time_eps": 0.0,
    "tempered_confidence": False,
}

# The same of its BD3LM sampler, for checkpoints that were trained with block-causal attention.
BLOCK_CAUSAL: Mapping[str, Any] = {"attention": "block_causal", "block_length": 32, "padded_prompt": True}

# Fields of the published configs that do not change any result.
_HARMLESS = (
    # the published code attends to everything in every layer
    "sliding_window",
    "max_window_layers",
    # known from the tensor names
    "attention_bias",
)


def config_from_hf(fields: Mapping[str, Any], names: frozenset[str], source: str) -> ModelConfig:
    """Reads a `config.json`; same arguments and errors as `bicache_jax.models.llada.config_from_hf`."""
    # The published code attends to everything in every layer, whatever types the file names.
    file = Fields({name: value for name, value in fields.items() if name != "layer_types"}, source)
    file.read("mlp_bias", default=False, allowed=(False,))
    config = ModelConfig(
        family="a2d",
        **block_from_hf(file, names, max_length=32768),
        mask_id=file.read("mask_token_id", int, least=0),
        **LOOP,
    )
    file.check_rest(_HARMLESS)
    return config


def tensor_map(config: ModelConfig) -> TensorMap:
    """Checkpoint name of every parameter."""
    return block_names(config)
