"""SDAR (arXiv 2510.06303): Qwen3 checkpoints turned into block diffusion models; attention is block-causal.

The mixtures of experts of the line (`sdar_moe`) have the fields and tensor names of Qwen3-MoE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bicache_jax.checkpoints.fields import Fields, TensorMap
from bicache_jax.core.config import Experts, ModelConfig
from bicache_jax.models.llama_names import block_from_hf, block_names

MODEL_TYPES = ("sdar", "sdar_moe")
PUBLISHED_MASK_ID = 151669

# Settings of its published loop (`generate.py`); fields of `ModelConfig`.
LOOP: Mapping[str, Any] = {
    "shift_logits": False,
    "anchor_blocks": False,
    "remasking": "low_confidence",
    "schedule": "even",
    "time_eps": 0.0,
    "attention": "block_causal",
    "padded_prompt": False,
    "tempered_confidence": True,
}

_READ = ("block_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size")

# Fields of the published configs that do not change any result.
_HARMLESS = (
    # unused while use_sliding_window is off
    "sliding_window",
    "max_window_layers",
    # known from the tensor names
    "attention_bias",
    # of training, and of how experts are spread over devices
    "debug",
    "ep_size",
    "micro_forward",
    "skip_checkpoint",
    "use_deepep",
    "output_router_logits",
    "router_aux_loss_coef",
)


def config_from_hf(fields: Mapping[str, Any], names: frozenset[str], source: str) -> ModelConfig:
    """Reads a `config.json`; same arguments and errors as `bicache_jax.models.llada.config_from_hf`."""
    file = Fields(fields, source, supported=_READ)
    experts = None
    if fields.get("num_experts"):
        layers, every = file.read("num_hidden_layers", int), file.read("decoder_sparse_step", int, default=1)
        dense = set(file.read("mlp_only_layers", list, default=[]))
        experts = Experts(
            num=file.read("num_experts", int),
            per_token=file.read("num_experts_per_tok", int),
            d_expert=file.read("moe_intermediate_size", int),
            dense_layers=tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % every),
            renormalise=file.read("norm_topk_prob", bool, default=False),
        )
    config = ModelConfig(
        family="sdar",
        **block_from_hf(file, names, max_length=32768),
        experts=experts,
        mask_id=file.read("mask_token_id", int, default=PUBLISHED_MASK_ID, least=0),
        block_length=file.read("block_size", int, default=4),
        **LOOP,
    )
    file.check_rest(_HARMLESS)
    return config


def tensor_map(config: ModelConfig) -> TensorMap:
    """Checkpoint name of every parameter."""
    return block_names(config)
