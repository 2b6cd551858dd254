"""Dream (arXiv 2508.15487): Dream-7B, DiffuCoder. A Qwen2 block whose logits at j - 1 predict position j."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bicache_jax.checkpoints.fields import TensorMap, read_field, read_ids
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.types import BicacheError

MODEL_TYPES = ("dream",)
PUBLISHED_MASK_ID = 151666


def config_from_hf(fields: Mapping[str, Any], names: frozenset[str], source: str) -> ModelConfig:
    """Reads a `config.json`; arguments and errors as `bicache_jax.models.llada.config_from_hf`."""
    read_field(fields, "hidden_act", source, default="silu", allowed=("silu",))
    read_field(fields, "use_sliding_window", source, default=False, allowed=(False,))
    if fields.get("rope_scaling") is not None:
        raise BicacheError(f"{source}: field 'rope_scaling' is {fields['rope_scaling']!r}, supported: null")
    d_model = read_field(fields, "hidden_size", source, int)
    num_heads = read_field(fields, "num_attention_heads", source, int)
    return ModelConfig(
        family="dream",
        vocab_size=read_field(fields, "vocab_size", source, int),
        d_model=d_model,
        num_layers=read_field(fields, "num_hidden_layers", source, int),
        num_heads=num_heads,
        num_kv_heads=read_field(fields, "num_key_value_heads", source, int, default=num_heads),
        head_dim=read_field(fields, "head_dim", source, int, default=d_model // max(1, num_heads)),
        d_mlp=read_field(fields, "intermediate_size", source, int),
        rope_theta=float(read_field(fields, "rope_theta", source, float, default=10000.0)),
        norm_eps=float(read_field(fields, "rms_norm_eps", source, float, default=1e-6)),
        max_length=read_field(fields, "max_position_embeddings", source, int, default=32768),
        mask_id=read_field(fields, "mask_token_id", source, int, default=PUBLISHED_MASK_ID, least=0),
        eos_ids=read_ids(fields, "eos_token_id", source),
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        tied=read_field(fields, "tie_word_embeddings", source, bool, default=False),
        shift_logits=True,
    )


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
