"""LLaDA-MoE (arXiv 2509.24389): LLaDA-MoE-7B-A1B. Qwen3's attention, a mixture of experts; decoded by LLaDA's loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bicache_jax.checkpoints.fields import Fields, TensorMap
from bicache_jax.core.config import Experts, ModelConfig
from bicache_jax.models import llada
from bicache_jax.models.llama_names import block_from_hf, block_names

MODEL_TYPES = ("llada", "llada_moe")
PUBLISHED_MASK_ID = 156895
LOOP = llada.LOOP

_READ = ("num_experts", "num_experts_per_tok", "expert_intermediate_size", "moe_layer_freq", "qk_layernorm")

# Settings of the published modelling code that this one implements.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "routed_scaling_factor": (1,),
    "router_num_group": (1,),
    "router_topk_group": (1,),
}

# Fields of the published configs that do not change any result.
_HARMLESS = (
    "output_router_logits",
    "router_aux_loss_coef",
    # the published code does not read it
    "norm_topk_prob",
    # known from the tensor names
    "attention_bias",
)


def is_mine(fields: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of this family, whose `model_type` is also LLaDA's."""
    return "LLaDAMoEModelLM" in (fields.get("architectures") or ()) or bool(fields.get("num_experts"))


def config_from_hf(fields: Mapping[str, Any], names: frozenset[str], source: str) -> ModelConfig:
    """Reads a `config.json`; same arguments and errors as `bicache_jax.models.llada.config_from_hf`."""
    file = Fields(fields, source, supported=_READ)
    for field, allowed in _REQUIRED.items():
        file.read(field, default=allowed[0], allowed=allowed)
    width = file.read("expert_intermediate_size", int)
    dense_width = file.read("dense_intermediate_size", int, default=width)
    block = block_from_hf(file, names, max_length=8192, d_mlp=dense_width)
    mixed = file.read("moe_layer_freq", list, default=[1] * block["num_layers"])
    if len(mixed) != block["num_layers"]:
        raise ValueError(f"field 'moe_layer_freq' has {len(mixed)} entries for {block['num_layers']} layers")
    file.read("qk_layernorm", default=block["qk_norm"], allowed=(block["qk_norm"],))
    config = ModelConfig(
        family="llada_moe",
        **block,
        mask_id=file.read("mask_token_id", int, default=PUBLISHED_MASK_ID, least=0),
        experts=Experts(
            num=file.read("num_experts", int),
            per_token=file.read("num_experts_per_tok", int),
            d_expert=width,
            dense_layers=tuple(layer for layer, wanted in enumerate(mixed) if not wanted),
        ),
        **LOOP,
    )
    file.check_rest(_HARMLESS)
    return config


def tensor_map(config: ModelConfig) -> TensorMap:
    """Checkpoint name of every parameter."""
    return block_names(config)
