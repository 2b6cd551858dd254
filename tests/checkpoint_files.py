"""Random checkpoints in Hugging Face layout, of every variant that the published configs can ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLADA: dict[str, Any] = {
    "model_type": "llada", "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3, "mlp_hidden_size": 48,
    "vocab_size": 101, "embedding_size": 101, "max_sequence_length": 256, "rope_theta": 1e4, "mask_token_id": 100,
    "eos_token_id": 1, "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms",
}  # fmt: skip
DREAM: dict[str, Any] = {
    "model_type": "Dream", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 101,
    "num_hidden_layers": 3, "intermediate_size": 48, "max_position_embeddings": 256, "mask_token_id": 100,
    "eos_token_id": 1, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip


def llada_tensors(fields: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors for a LLaDA `config.json`, named as the published modelling code names them."""
    d_model, vocab = fields["d_model"], fields.get("embedding_size") or fields["vocab_size"]
    kv = d_model // fields["n_heads"] * (fields.get("n_kv_heads") or fields["n_heads"])
    d_mlp = fields.get("mlp_hidden_size") or 4 * d_model
    everywhere = fields.get("include_bias", False)
    in_qkv = everywhere or fields.get("include_qkv_bias", False)
    draw = _Draw(seed)
    draw.matrix("model.transformer.wte", vocab, d_model)
    for layer in range(fields["n_layers"]):
        block = f"model.transformer.blocks.{layer}."
        for name in ("attn_norm", "ff_norm"):
            draw.norm(block + name, d_model, everywhere)
        for name, out, size, bias in (
            ("q_proj", d_model, d_model, in_qkv),
            ("k_proj", kv, d_model, in_qkv),
            ("v_proj", kv, d_model, in_qkv),
            ("attn_out", d_model, d_model, everywhere),
            ("ff_proj", d_mlp, d_model, everywhere),
            ("up_proj", d_mlp, d_model, everywhere),
            ("ff_out", d_model, d_mlp, everywhere),
        ):
            draw.matrix(block + name, out, size, bias)
    draw.norm("model.transformer.ln_f", d_model, everywhere)
    if not fields.get("weight_tying"):
        draw.matrix("model.transformer.ff_out", vocab, d_model, everywhere)
    return draw.tensors


def dream_tensors(fields: dict[str, Any], seed: int = 0, *, qkv_bias: bool = True) -> dict[str, np.ndarray]:
    """Tensors for a Dream `config.json`."""
    d_model, vocab, d_mlp = fields["hidden_size"], fields["vocab_size"], fields["intermediate_size"]
    head = fields.get("head_dim") or d_model // fields["num_attention_heads"]
    queries, kv = fields["num_attention_heads"] * head, fields["num_key_value_heads"] * head
    draw = _Draw(seed)
    draw.matrix("model.embed_tokens", vocab, d_model)
    for layer in range(fields["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        draw.norm(block + "input_layernorm", d_model)
        draw.norm(block + "post_attention_layernorm", d_model)
        for name, out in (("q_proj", queries), ("k_proj", kv), ("v_proj", kv)):
            draw.matrix(f"{block}self_attn.{name}", out, d_model, qkv_bias)
        draw.matrix(block + "self_attn.o_proj", d_model, queries)
        for name, out, size in (
            ("gate_proj", d_mlp, d_model),
            ("up_proj", d_mlp, d_model),
            ("down_proj", d_model, d_mlp),
        ):
            draw.matrix(f"{block}mlp.{name}", out, size)
    draw.norm("model.norm", d_model)
    if not fields.get("tie_word_embeddings"):
        draw.matrix("lm_head", vocab, d_model)
    return draw.tensors


def write(folder: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray], *, shards: int = 1) -> Path:
    """Writes `config.json` and the tensors, in one file or in shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = sorted(tensors)[shard::shards]
        where.update(dict.fromkeys(part, file))
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llada(folder: Path, *, shards: int = 1, seed: int = 0, **fields: Any) -> Path:
    """A LLaDA checkpoint folder; fields replace those of `LLADA`."""
    fields = LLADA | fields
    return write(folder, fields, llada_tensors(fields, seed), shards=shards)


class _Draw:
    """Random tensors by name; weights large enough that every part moves the logits."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tensors: dict[str, np.ndarray] = {}

    def _put(self, name: str, mean: float, scale: float, *shape: int) -> None:
        self.tensors[name] = (mean + scale * self.rng.standard_normal(shape)).astype(np.float32)

    def matrix(self, name: str, out: int, size: int, bias: bool = False) -> None:
        self._put(f"{name}.weight", 0.0, size**-0.5, out, size)
        if bias:
            self._put(f"{name}.bias", 0.0, 0.3, out)

    def norm(self, name: str, size: int, bias: bool = False) -> None:
        self._put(f"{name}.weight", 1.0, 0.2, size)
        if bias:
            self._put(f"{name}.bias", 0.0, 0.3, size)
