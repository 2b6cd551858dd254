"""Config fields and tensor names of the blocks that Qwen and Llama checkpoints share, in Hugging Face layout."""

from __future__ import annotations

from typing import Any

from bicache_jax.checkpoints.fields import Fields, TensorMap
from bicache_jax.core.config import ModelConfig


def block_from_hf(file: Fields, names: frozenset[str], *, max_length: int, d_mlp: int | None = None) -> dict[str, Any]:
    """The fields of `ModelConfig` that such a `config.json` gives.

    Args:
        file: its fields.
        names: tensor names of the checkpoint; they show which biases exist.
        max_length: longest sequence where the file does not say.
        d_mlp: width of the MLP, where another field gives it.

    Raises:
        BicacheError: a field is missing, has the wrong type, or selects a variant that is not supported.
    """
    file.read("hidden_act", default="silu", allowed=("silu",))
    d_model = file.read("hidden_size", int)
    num_heads = file.read("num_attention_heads", int)
    return {
        "vocab_size": file.read("vocab_size", int),
        "d_model": d_model,
        "num_layers": file.read("num_hidden_layers", int),
        "num_heads": num_heads,
        "num_kv_heads": file.read("num_key_value_heads", int, default=num_heads),
        "head_dim": file.read("head_dim", int, default=d_model // num_heads),
        "d_mlp": file.read("intermediate_size", int) if d_mlp is None else d_mlp,
        "rope_theta": file.rope_theta(10000.0),
        "norm_eps": float(file.read("rms_norm_eps", float, default=1e-6)),
        "max_length": file.read("max_position_embeddings", int, default=max_length),
        "eos_ids": file.ids("eos_token_id"),
        "qkv_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "qk_norm": "model.layers.0.self_attn.q_norm.weight" in names,
        "tied": file.read("tie_word_embeddings", bool, default=False),
    }


def block_names(config: ModelConfig) -> TensorMap:
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
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        names["layers", name, "scale"] = f"{block}self_attn.{name}.weight"
    if not config.tied:
        names["head",] = "lm_head.weight"
    mlps, layers = mlp_names(config)
    ignored = ("rotary_emb.inv_freq", *["lm_head.weight"] * config.tied)
    return TensorMap({**names, **mlps}, ignored=ignored, layers=layers)


def mlp_names(config: ModelConfig) -> tuple[dict[tuple[str, ...], str], dict[str, tuple[int, ...]]]:
    """Checkpoint names of the MLPs and mixtures of experts, and the layers of each stack of them."""
    mlp, experts, parts = "model.layers.{layer}.mlp.", config.experts, ("gate", "up", "down")
    dense = {name: f"{mlp}{name}_proj.weight" for name in parts}
    if experts is None:
        return {("layers", name, "kernel"): stored for name, stored in dense.items()}, {}
    names: dict[tuple[str, ...], str] = {("mixture", "router", "weight"): f"{mlp}gate.weight"}
    if experts.bias:
        names["mixture", "router", "bias"] = f"{mlp}gate.expert_bias"
    for name in parts:
        names["mixture", name, "kernel"] = f"{mlp}experts.{{expert}}.{name}_proj.weight"
        if experts.d_shared:
            names["mixture", f"shared_{name}", "kernel"] = f"{mlp}shared_experts.{name}_proj.weight"
        if experts.dense_layers:
            names["dense", name, "kernel"] = dense[name]
    return names, {"mixture": config.mixture_layers, "dense": experts.dense_layers}
