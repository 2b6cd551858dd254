"""Every field of a config.json is used, known to change no result, or refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import checkpoint_files
import golden
import pytest

from bicache_jax import BicacheError, load_model
from bicache_jax.checkpoints.fields import read_json
from bicache_jax.checkpoints.known_fields import HARMLESS, UNSUPPORTED
from bicache_jax.cli import main
from bicache_jax.configs import model_shape
from bicache_jax.models import MODULES

# As published: LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5 have the same fields.
LLADA_8B: dict[str, Any] = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip
ILLADA_8B = LLADA_8B | {
    "embedding_size": 155136, "max_sequence_length": 8192, "mlp_hidden_size": 14336, "n_kv_heads": 8,
    "torch_dtype": "bfloat16", "vocab_size": 155136, "weight_tying": True, "mask_token_id": 5, "eos_token_id": 1,
}  # fmt: skip
DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072,
    "max_window_layers": 28, "model_type": "Dream", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
# Made from Qwen2.5-Coder, whose fields say more.
DREAM_CODER_7B = DREAM_7B | {
    "_name_or_path": "qwen2.5-coder", "bos_token_id": 151665, "sliding_window": 131072, "use_mrope": False,
    "attention_bias": True, "layer_types": ["full_attention"] * 28,
}  # fmt: skip
PUBLISHED = {
    "LLaDA-8B": (LLADA_8B, "llada_8b"),
    "LLaDA-8B, all of transformers' defaults": (
        LLADA_8B | {name: value for name, value in read_json(golden.FOLDERS["dream"] / "config.json").items()
                    if name in HARMLESS or not value} | {"tie_word_embeddings": True, "eos_token_id": 126081},
        "llada_8b",
    ),
    "Dream-7B": (DREAM_7B, "dream_7b"),
    "Dream-Coder-7B, DiffuCoder-7B": (DREAM_CODER_7B, "dream_7b"),
    "saved by transformers 5": (
        {name: value for name, value in DREAM_7B.items() if name != "rope_theta"}
        | {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        "dream_7b",
    ),
}  # fmt: skip
NAMES = frozenset({"model.layers.0.self_attn.q_proj.bias"})


def read(fields: dict[str, Any]) -> Any:
    return MODULES[fields["model_type"].lower()].config_from_hf(fields, NAMES, "config.json")


@pytest.mark.parametrize(("fields", "shape"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_are_read(fields: dict[str, Any], shape: str) -> None:
    assert read(fields) == model_shape(shape)


def test_the_config_of_illada() -> None:
    expected = {"num_kv_heads": 8, "d_mlp": 14336, "vocab_size": 155136, "max_length": 8192, "mask_id": 5, "tied": True}
    assert read(ILLADA_8B) == dataclasses.replace(model_shape("llada_8b"), **expected, eos_ids=(1,))


UNLIKE: dict[str, Any] = {
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4},
    "quantization_config": {"quant_method": "fp8"},
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "block_size": 32,
    "num_experts": 8,
    "qk_layernorm": True,
    "clip_qkv": 8.0,
    "partial_rotary_factor": 0.5,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.1,
    "is_decoder": True,
    "pruned_heads": {"0": [1]},
    "vision_config": {"depth": 2},
    "a_field_of_tomorrow": 3,
}


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(("name", "value"), UNLIKE.items(), ids=UNLIKE)
def test_what_changes_the_computation_is_refused_by_name(family: str, name: str, value: Any) -> None:
    fields = {"llada": checkpoint_files.LLADA, "dream": checkpoint_files.DREAM}[family] | {name: value}
    with pytest.raises(BicacheError, match=rf"^config\.json: .*'{name}'") as caught:
        read(fields)
    assert "\n" not in str(caught.value)


OFF: dict[str, list[Any]] = {
    "rope_scaling": [None, False, {}, {"type": "default"}, {"rope_type": "default", "factor": 1.0}],
    "rope_parameters": [None, {}, {"rope_type": "default", "rope_theta": 1e4}],
    "quantization_config": [None, {}],
    "use_sliding_window": [None, False],
    "layer_types": [None, ["full_attention"] * 3],
    "num_experts": [None, 0],
    "qk_layernorm": [False],
    "clip_qkv": [None],
    "partial_rotary_factor": [1, 1.0, None],
    "logit_scale": [1.0],
    "pruned_heads": [{}],
    "a_field_of_tomorrow": [None, False, 0, 0.0, "", [], {}],
    "_note": ["of a tool"],
    "attention_dropout": [0.0, 0.1],
    "id2label": [{"0": "LABEL_0"}],
}  # fmt: skip


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OFF.items() for value in values])
def test_values_that_ask_for_nothing_pass(family: str, name: str, value: Any) -> None:
    fields = {"llada": checkpoint_files.LLADA, "dream": checkpoint_files.DREAM}[family]
    assert read(fields | {name: value}) == read(fields)


def test_a_window_that_is_off_has_a_size_in_dream_alone() -> None:
    assert read(checkpoint_files.DREAM | {"sliding_window": 4096}) == read(checkpoint_files.DREAM)
    with pytest.raises(BicacheError, match="unknown field 'sliding_window'.*remove it from the file"):
        read(checkpoint_files.LLADA | {"sliding_window": 4096})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "rope_theta is 10000.0.*it is 20000.0"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rescaled rotary embedding"),
        ({"rope_scaling": {"factor": 2.0}}, "rescaled rotary embedding"),
        ({"rope_scaling": "yarn"}, "'rope_scaling' must be dict"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters: field 'rope_theta' must be positive"),
        ({"hidden_size": 64}, "'hidden_size' is 64, supported: 32"),
        ({"multi_query_attention": "yes"}, "'multi_query_attention' must be bool"),
        ({"tomorrow": "x" * 500, "later": 1}, r"unknown fields 'tomorrow' \('x+\.\.\.\), 'later' \(1\)"),
        ({"num_experts": 8, "num_experts_per_tok": 2, "clip_qkv": 3.0}, r"experts \('num_experts' is 8, 'num_exp"),
    ],
)
def test_faults_say_which_field_and_why(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BicacheError, match=words):
        read(checkpoint_files.LLADA | fields)


def test_a_base_that_only_the_new_field_names_is_used() -> None:
    fields = {name: value for name, value in checkpoint_files.LLADA.items() if name != "rope_theta"}
    assert read(fields).rope_theta == 1e4  # of the published code
    assert read(fields | {"rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}}).rope_theta == 3e5


def test_no_field_is_in_two_lists() -> None:
    own = [set(family._HARMLESS) for family in MODULES.values()]
    assert not HARMLESS.keys() & UNSUPPORTED.keys()
    assert not any(names & (HARMLESS.keys() | UNSUPPORTED.keys()) for names in own)


def test_the_command_and_loading_refuse_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint_files.llada(tmp_path / "model", rope_scaling={"type": "yarn", "factor": 4.0})
    with pytest.raises(BicacheError, match="rope_scaling"):
        load_model(folder)
    for flags in (["convert"], ["generate", "--input", str(tmp_path / "in.jsonl")]):
        (tmp_path / "in.jsonl").write_text('{"prompt_ids": [3]}\n')
        assert main([*flags, "--model", str(folder), "--output", str(tmp_path / "out")]) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "rope_scaling" in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_shape_decodes_as_its_family() -> None:
    for name in ("llada_8b", "dream_7b", "small"):
        config = model_shape(name)
        for field, value in MODULES[config.family].LOOP.items():
            assert getattr(config, field) == value, (name, field)
