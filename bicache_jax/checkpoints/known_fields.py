"""The meaning of `config.json` fields that no family reads: data for `bicache_jax.checkpoints.fields.Fields`.

A field that a family reads is in neither list. Fields that begin with `_` are notes by the tools that wrote the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEQUANTISE = "name the folder of the checkpoint that it was made from, or dequantise it first"

_HARMLESS: Mapping[str, str] = {
    "names the code, the tools and the task that the model is for": (
        "architectures auto_map name_or_path transformers_version tokenizer_class finetuning_task problem_type"
        " task_specific_params id2label label2id num_labels torchscript unsloth_version unsloth_fixed"
    ),
    "the dtype is the tensors' own, and a flag's": "torch_dtype dtype use_bfloat16",
    "says how the same numbers are computed": (
        "attn_implementation flash_attention use_flash_attention use_cache chunk_size_feed_forward pretraining_tp"
        " gradient_checkpointing use_return_dict return_dict output_hidden_states output_attentions"
    ),
    "is for training alone": (
        "initializer_range attention_dropout hidden_dropout residual_dropout embedding_dropout output_dropout"
        " attention_probs_dropout_prob hidden_dropout_prob classifier_dropout tf_legacy_loss fuse_cross_entropy"
    ),
    "names tokens that no pass looks at": (
        "bos_token_id pad_token_id sep_token_id cls_token_id unk_token_id decoder_start_token_id forced_bos_token_id"
        " forced_eos_token_id"
    ),
    "is a default of transformers' generate(); here requests and flags say how to decode": (
        "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty"
        " temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size"
        " encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate"
        " remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"
    ),
}

_UNSUPPORTED: Mapping[str, str] = {
    f"quantised weights: {DEQUANTISE}": "quantization_config compression_config quantization",
    "attention to a part of the sequence": "use_sliding_window layer_types attention_window",
    "block-causal attention": "block_size bd_size block_causal",
    "causal attention": "is_causal is_decoder",
    "another model inside": "is_encoder_decoder add_cross_attention cross_attention_hidden_size text_config",
    "a mixture of experts": (
        "num_experts num_local_experts n_routed_experts num_experts_per_tok moe_intermediate_size"
        " expert_intermediate_size shared_expert_intermediate_size num_shared_experts n_shared_experts moe_layer_freq"
    ),
    "norms of queries and keys": "qk_norm use_qk_norm qk_layernorm query_key_norm",
    "clamped queries, keys and values": "clip_qkv",
    "compressed keys and values": "kv_lora_rank q_lora_rank",
    "a rotary embedding of a part of each head": "partial_rotary_factor rotary_pct rotary_dim use_mrope",
    "bounded logits": (
        "attn_logit_softcapping final_logit_softcapping attn_logit_softcap final_logit_softcap logit_softcapping"
    ),
    "scaled activations": (
        "logit_scale logits_scale logits_scaling embedding_multiplier residual_multiplier attention_multiplier"
        " query_pre_attn_scalar scale_emb scale_depth"
    ),
    "self-conditioning": "self_conditioning",
    "heads that were cut out": "pruned_heads",
    "pictures": "vision_config mm_vision_tower vision_tower image_token_id image_token_index",
}


def _by_name(groups: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in groups.items() for name in names.split()}


HARMLESS: Mapping[str, str] = _by_name(_HARMLESS)
"""Fields that do not change the results of any family, each with the reason."""

UNSUPPORTED: Mapping[str, str] = _by_name(_UNSUPPORTED)
"""Fields that change what a model computes, each with the feature that it selects."""

_OFF_AT_ONE = frozenset(
    "partial_rotary_factor rotary_pct logit_scale logits_scale logits_scaling embedding_multiplier residual_multiplier"
    " scale_emb factor".split()
)


def is_off(name: str, value: Any) -> bool:
    """Whether a value switches a field off: null, false, zero, empty, or a factor of one."""
    if name == "layer_types":  # one entry per layer
        return not value or (isinstance(value, list) and all(kind == "full_attention" for kind in value))
    if name in _OFF_AT_ONE and value == 1:
        return True
    return not value
