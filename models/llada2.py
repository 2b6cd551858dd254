"""LLaDA2 (arXiv 2512.15745): LLaDA2.0 and 2.1, mini and flash. A mixture of experts, block-causal attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bicache_jax.checkpoints.fields import Fields, TensorMap
from bicache_jax.core.config import Experts, ModelConfig
from bicache_jax.models.llama_names import mlp_names

MODEL_TYPES = ("llada2_moe", "llada2")
PUBLISHED_MASK_ID = 156895

# Settings of its published loop; fields of `ModelConfig`.
LOOP: Mapping[str, Any] = {
    "shift_logits": False,
    "anchor_blocks": False,
    "remasking": "low_confidence",
    "schedule": "even",
    "time_eps": 0.0,
    "attention": "block_causal",
    "block_length": 32,
    "padded_prompt": False,
    "tempered_confidence": True,
}

_READ = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_shared_experts",
    "use_qk_norm",
    "partial_rotary_factor",
)

# Settings of the published modelling code that this one implements.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "use_qk_norm": (True,),
    "use_rmsnorm": (True,),
    "norm_head": (False,),
    "norm_topk_prob": (True,),
    "score_function": ("sigmoid",),
    "moe_router_enable_expert_bias": (True,),
    "moe_router_enable_shared_expert": (True,),
    "using_split_qkv_in_self_attention": (False,),
}

# Fields of the published configs that do not change any result.
_HARMLESS = (
    # unused while use_sliding_window is off
    "sliding_window",
    "max_window_layers",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_dtype",  # always float32
)


def config_from_hf(fields: Mapping[str, Any], names: frozenset[str], source: str) -> ModelConfig:
    """Reads a `config.json`; same arguments and errors as `bicache_jax.models.llada.config_from_hf`."""
    file = Fields(fields, source, supported=_READ)
    for field, allowed in _REQUIRED.items():
        file.read(field, default=allowed[0], allowed=allowed)
    d_model, num_heads = file.read("hidden_size", int), file.read("num_attention_heads", int)
    head_dim, num_layers = file.read("head_dim", int, default=d_model // num_heads), file.read("num_hidden_layers", int)
    width, shared = file.read("moe_intermediate_size", int), file.read("num_shared_experts", int, default=0, least=0)
    dense = file.read("first_k_dense_replace", int, default=0, least=0)
    config = ModelConfig(
        family="llada2",
        vocab_size=file.read("vocab_size", int),
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=file.read("num_key_value_heads", int, default=num_heads),
        head_dim=head_dim,
        d_mlp=file.read("intermediate_size", int),
        rope_theta=file.rope_theta(10000.0),
        norm_eps=float(file.read("rms_norm_eps", float, default=1e-6)),
        max_length=file.read("max_position_embeddings", int, default=32768),
        mask_id=file.read("mask_token_id", int, default=PUBLISHED_MASK_ID, least=0),
        eos_ids=file.ids("eos_token_id"),
        qk_norm=True,
        rotary_dim=int(head_dim * file.read("partial_rotary_factor", float, default=1.0)),
        tied=file.read("tie_word_embeddings", bool, default=False),
        experts=Experts(
            num=file.read("num_experts", int),
            per_token=file.read("num_experts_per_tok", int),
            d_expert=width,
            d_shared=width * shared,
            dense_layers=tuple(range(min(dense, num_layers))),
            score="sigmoid",
            renormalise=True,
            scale=float(file.read("routed_scaling_factor", float, default=1.0)),
            bias=True,
            groups=file.read("n_group", int, default=1),
            top_groups=file.read("topk_group", int, default=1),
        ),
        **LOOP,
    )
    file.check_rest(_HARMLESS)
    return config


def tensor_map(config: ModelConfig) -> TensorMap:
    """Checkpoint name of every parameter."""
    block = "model.layers.{layer}."
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    names: dict[tuple[str, ...], str] = {
        ("embed",): "model.word_embeddings.weight",
        ("norm", "scale"): "model.norm.weight",
        ("layers", "attention_norm", "scale"): f"{block}input_layernorm.weight",
        ("layers", "mlp_norm", "scale"): f"{block}post_attention_layernorm.weight",
        ("layers", "q_norm", "scale"): f"{block}attention.query_layernorm.weight",
        ("layers", "k_norm", "scale"): f"{block}attention.key_layernorm.weight",
        ("layers", "o", "kernel"): f"{block}attention.dense.weight",
        **{("layers", name, "weight"): f"{block}attention.query_key_value.weight" for name in "qkv"},
    }
    if not config.tied:
        names["head",] = "lm_head.weight"
    mlps, layers = mlp_names(config)
    rows = {("layers", "q", "weight"): 0, ("layers", "k", "weight"): heads, ("layers", "v", "weight"): heads + kv_heads}
    return TensorMap(
        {**names, **mlps},
        ignored=("rotary_emb.inv_freq", *["lm_head.weight"] * config.tied),
        layers=layers,
        rows={path: (first, heads + 2 * kv_heads) for path, first in rows.items()},
    )
