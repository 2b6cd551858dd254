"""Dream (arXiv 2508.15487): Dream-7B, Dream-Coder, DiffuCoder. Qwen2 blocks; logits at j - 1 predict position j."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bicache_jax.checkpoints.fields import Fields, TensorMap
from bicache_jax.core.config import ModelConfig

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
    file.read("hidden_act", default="silu", allowed=("silu",))
    d_model = file.read("hidden_size", int)
    num_heads = file.read("num_attention_heads", int)
    config = ModelConfig(
        family="dream",
        vocab_size=file.read("vocab_size", int),
        d_model=d_model,
        num_layers=file.read("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=file.read("num_key_value_heads", int, default=num_heads),
        head_dim=file.read("head_dim", int, default=d_model // num_heads),
        d_mlp=file.read("intermediate_size", int),
        rope_theta=file.rope_theta(10000.0),
        norm_eps=float(file.read("rms_norm_eps", float, default=1e-6)),
        max_length=file.read("max_position_embeddings", int, default=32768),
        mask_id=file.read("mask_token_id", int, default=PUBLISHED_MASK_ID, least=0),
        eos_ids=file.ids("eos_token_id"),
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        tied=file.read("tie_word_embeddings", bool, default=False),
        **LOOP,
    )
    file.check_rest(_HARMLESS)
    return config


def tensor_map(config: ModelConfig) -> TensorMap:
    """Checkpoint name of every parameter."""
    block = "model.layers.{layer}."
    names = {
        ("embed",): "model.embed_tokens.weight",
        ("norm", "scale"): "model.norm.weight",
        ("layers", "attention_norm", "scale"): f"{block}input_layernorm.weight",
        ("layers", "mlp_norm", "scale"): f"{block}post_attention_layernorm.weight",
        ("layers", "o", "kernel"): f"{block}self_attn.o_proj.weight",
    }
    for name in ("q", "k", "v"):
        names["layers", name, "weight"] = f"{block}self_attn.{name}_proj.weight"
        if config.qkv_bias:
            names["layers", name, "bias"] = f"{block}self_attn.{name}_proj.bias"
    for name in ("gate", "up", "down"):
        names["layers", name, "kernel"] = f"{block}mlp.{name}_proj.weight"
    if not config.tied:
        names["head",] = "lm_head.weight"
    return TensorMap(
        names, ignored=("rotary_emb.inv_freq", "lm_head.weight") if config.tied else ("rotary_emb.inv_freq",)
    )
