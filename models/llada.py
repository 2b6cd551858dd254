"""LLaDA (arXiv 2502.09992): LLaDA-8B, LLaDA-1.5, iLLaDA-8B. Config and checkpoint names; the block is shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bicache_jax.checkpoints.fields import Fields, TensorMap
from bicache_jax.core.config import ModelConfig

MODEL_TYPES = ("llada",)
PUBLISHED_MASK_ID = 126336

# Settings of its published loop (`generate.py`); fields of `ModelConfig`.
LOOP: Mapping[str, Any] = {
    "shift_logits": False,
    "anchor_blocks": False,
    "remasking": "low_confidence",
    "schedule": "even",
    "time_eps": 0.0,
    "tempered_confidence": False,
}

# Settings of the published modelling code that the shared block implements.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "activation_type": ("silu", "swiglu"),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "scale_logits": (False,),
    "input_emb_norm": (False,),
    "attention_layer_norm": (False,),
}

# Fields of the published configs that do not change any result.
_HARMLESS = (
    # only used by variants that are rejected above
    "alibi_bias_max",
    "attention_layer_norm_with_affine",
    # known from the tensor names
    "bias_for_layer_norm",
    "layer_norm_with_affine",
    # how the modelling code computes the same numbers, and how it initialises training
    "block_group_size",
    "precision",
    "rope_full_precision",  # always on here
    "init_device",
    "init_fn",
    "init_std",
    "init_cutoff_factor",
    "train_max_sequence_length",
    # names of transformers that the modelling code does not read
    "max_position_embeddings",
    "tie_word_embeddings",
)


def config_from_hf(fields: Mapping[str, Any], names: frozenset[str], source: str) -> ModelConfig:
    """Reads a `config.json`.

    Args:
        fields: its fields.
        names: tensor names of the checkpoint; they show which biases exist.
        source: file name for messages.

    Returns:
        The architecture.

    Raises:
        BicacheError: a field is missing, has the wrong type, is unknown, or selects a variant that LLaDA does not use.
    """
    file = Fields(fields, source)
    for field, allowed in _REQUIRED.items():
        file.read(field, default=allowed[0], allowed=allowed)
    d_model = file.read("d_model", int)
    num_heads = file.read("n_heads", int)
    if d_model % num_heads:
        file.read("n_heads", allowed=tuple(n for n in range(1, d_model + 1) if d_model % n == 0))
    vocab_size = file.read("vocab_size", int)
    kv_default = 1 if file.read("multi_query_attention", bool, default=False) else num_heads
    bias = file.read("include_bias", bool, default=False)
    mlp_default = file.read("mlp_ratio", int, default=4) * d_model
    config = ModelConfig(
        family="llada",
        vocab_size=file.read("embedding_size", int, default=vocab_size),
        d_model=d_model,
        num_layers=file.read("n_layers", int),
        num_heads=num_heads,
        num_kv_heads=file.read("n_kv_heads", int, default=kv_default),
        head_dim=d_model // num_heads,
        d_mlp=file.read("mlp_hidden_size", int, default=mlp_default),
        rope_theta=file.rope_theta(10000.0),
        norm_eps=float(file.read("rms_norm_eps", float, default=1e-5)),
        max_length=file.read("max_sequence_length", int, default=4096),
        mask_id=file.read("mask_token_id", int, default=PUBLISHED_MASK_ID, least=0),
        eos_ids=file.ids("eos_token_id"),
        qkv_bias=file.read("include_qkv_bias", bool, default=False) or bias,
        bias=bias,
        norm_bias="model.transformer.ln_f.bias" in names,
        head_bias="model.transformer.ff_out.bias" in names,
        tied=file.read("weight_tying", bool, default=False),
        **LOOP,
    )
    for alias, value in {  # the modelling code also accepts these names, and some tools write them
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.d_mlp,
    }.items():
        file.read(alias, default=value, allowed=(value,))
    file.check_rest(_HARMLESS)
    return config


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
