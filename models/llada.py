"""LLaDA (arXiv 2502.09992): LLaDA-8B, LLaDA-1.5, iLLaDA-8B. Config and checkpoint names; the block is shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bicache_jax.checkpoints.fields import TensorMap, read_field, read_ids
from bicache_jax.core.config import ModelConfig

MODEL_TYPES = ("llada",)
PUBLISHED_MASK_ID = 126336

# Settings of the published modelling code that this block is built for.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "activation_type": ("silu", "swiglu"),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False, None),
    "scale_logits": (False, None),
    "input_emb_norm": (False, None),
    "attention_layer_norm": (False, None),
}


def config_from_hf(fields: Mapping[str, Any], names: frozenset[str], source: str) -> ModelConfig:
    """Reads a `config.json`.

    Args:
        fields: its fields.
        names: tensor names of the checkpoint; they tell which biases exist.
        source: file name for messages.

    Returns:
        The architecture.

    Raises:
        BicacheError: a field is missing, has the wrong type, or asks for a variant that is not LLaDA's.
    """
    for field, allowed in _REQUIRED.items():
        read_field(fields, field, source, default=allowed[0], allowed=allowed)
    d_model = read_field(fields, "d_model", source, int)
    num_heads = read_field(fields, "n_heads", source, int)
    if d_model % num_heads:
        read_field(fields, "n_heads", source, allowed=tuple(n for n in range(1, d_model + 1) if d_model % n == 0))
    vocab_size = read_field(fields, "vocab_size", source, int)
    kv_default = 1 if fields.get("multi_query_attention") else num_heads
    bias = read_field(fields, "include_bias", source, bool, default=False)
    return ModelConfig(
        family="llada",
        vocab_size=read_field(fields, "embedding_size", source, int, default=vocab_size),
        d_model=d_model,
        num_layers=read_field(fields, "n_layers", source, int),
        num_heads=num_heads,
        num_kv_heads=read_field(fields, "n_kv_heads", source, int, default=kv_default),
        head_dim=d_model // num_heads,
        d_mlp=read_field(
            fields,
            "mlp_hidden_size",
            source,
            int,
            default=read_field(fields, "mlp_ratio", source, int, default=4) * d_model,
        ),
        rope_theta=float(read_field(fields, "rope_theta", source, float, default=10000.0)),
        norm_eps=float(read_field(fields, "rms_norm_eps", source, float, default=1e-5)),
        max_length=read_field(fields, "max_sequence_length", source, int, default=4096),
        mask_id=read_field(fields, "mask_token_id", source, int, default=PUBLISHED_MASK_ID, least=0),
        eos_ids=read_ids(fields, "eos_token_id", source),
        qkv_bias=bias or read_field(fields, "include_qkv_bias", source, bool, default=False),
        bias=bias,
        norm_bias="model.transformer.ln_f.bias" in names,
        head_bias="model.transformer.ff_out.bias" in names,
        tied=read_field(fields, "weight_tying", source, bool, default=False),
    )


def tensor_map(config: ModelConfig) -> TensorMap:
    """Checkpoint name of every parameter."""
    block = "model.transformer.blocks.{layer}."
    linears = {
        "q": ("q_proj", config.qkv_bias),
        "k": ("k_proj", config.qkv_bias),
        "v": ("v_proj", config.qkv_bias),
        "o": ("attn_out", config.bias),
        "gate": ("ff_proj", config.bias),
        "up": ("up_proj", config.bias),
        "down": ("ff_out", config.bias),
    }
    names = {("embed",): "model.transformer.wte.weight", ("norm", "scale"): "model.transformer.ln_f.weight"}
    for norm, name in {"attention_norm": "attn_norm", "mlp_norm": "ff_norm"}.items():
        names["layers", norm, "scale"] = f"{block}{name}.weight"
        if config.norm_bias:
            names["layers", norm, "bias"] = f"{block}{name}.bias"
    for linear, (name, bias) in linears.items():
        names["layers", linear, "weight" if linear in "qkv" else "kernel"] = f"{block}{name}.weight"
        if bias:
            names["layers", linear, "bias"] = f"{block}{name}.bias"
    if config.norm_bias:
        names["norm", "bias"] = "model.transformer.ln_f.bias"
    head = "model.transformer.ff_out.weight"
    if not config.tied:
        names["head",] = head
    if config.head_bias:
        names["head_bias",] = "model.transformer.ff_out.bias"
    return TensorMap(names, ignored=("rotary_emb.inv_freq", *[head] * config.tied))
