"""Checkpoints of the newer families: read into stacks, written back tensor for tensor, refused where they differ."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import families
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bicache_jax import BicacheError, load_model
from bicache_jax.checkpoints.safetensors_folder import SafetensorsFolder
from bicache_jax.convert import convert
from bicache_jax.core.config import Experts, ModelConfig
from bicache_jax.loading import tensor_map
from bicache_jax.models import init


@pytest.mark.parametrize("name", ["sdar", "llada-moe", "llada2", "a2d-qwen3"])
def test_both_ways_and_no_tensor_changes(name: str, tmp_path: Path) -> None:
    mask = families.recorded(name)["mask_token_id"]
    convert(families.FOLDERS[name], tmp_path / "orbax", mask_id=mask)
    convert(tmp_path / "orbax", tmp_path / "back", to="safetensors", mask_id=mask)
    first, back = (load_file(folder / "model.safetensors") for folder in (families.FOLDERS[name], tmp_path / "back"))
    tied = {"lm_head.weight"} if families.load(name).config.tied else set()
    assert first.keys() - tied == back.keys()
    for tensor, values in back.items():
        np.testing.assert_array_equal(values, first[tensor], err_msg=tensor)
    with SafetensorsFolder(families.FOLDERS[name]) as tensors:
        assert tensors.bytes_read == 0
    orbax = load_model(tmp_path / "orbax", mask_id=mask)
    jax.tree.map(np.testing.assert_array_equal, orbax.params, families.load(name).params)


def _changed(name: str, folder: Path, **fields: Any) -> Path:
    shutil.copytree(families.FOLDERS[name], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llada2", {"score_function": "softmax"}, "field 'score_function' is 'softmax', supported: 'sigmoid'"),
        ("llada2", {"num_experts": 9}, "9 experts cannot be picked from 2 of 4 groups"),
        ("llada2", {"partial_rotary_factor": 0.3}, "rotary embedding needs even sizes"),
        ("llada2", {"num_shared_experts": 2}, "misshaped model.layers.1.mlp.shared_experts.gate_proj.weight"),
        ("llada2", {"num_experts": 12}, "missing model.layers.1.mlp.experts.8.gate_proj.weight"),
        ("llada-moe", {"clip_qkv": 8.0}, "clamped queries, keys and values ('clip_qkv' is 8.0)"),
        ("llada-moe", {"moe_layer_freq": [1, 1]}, "'moe_layer_freq' has 2 entries for 3 layers"),
        ("llada-moe", {"moe_router_score_function": "sigmoid"}, "'moe_router_score_function' is 'sigmoid'"),
        ("sdar", {"use_sliding_window": True}, "attention to a part of the sequence"),
        ("sdar", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "a rescaled rotary embedding"),
    ],
)
def test_what_differs_is_refused(name: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    mask = families.recorded(name)["mask_token_id"]
    with pytest.raises(BicacheError) as fault:
        load_model(_changed(name, tmp_path / "model", **fields), mask_id=mask)
    assert message in str(fault.value) and "\n" not in str(fault.value)


def test_a_layer_without_experts_in_the_middle(tmp_path: Path) -> None:
    """LLaDA-MoE's `moe_layer_freq`: any layer may have a plain MLP."""
    folder = _changed("llada-moe", tmp_path / "model", moe_layer_freq=[1, 0, 1])
    tensors = load_file(folder / "model.safetensors")
    kept = {name: values for name, values in tensors.items() if not name.startswith("model.layers.1.mlp.")}
    rng = np.random.default_rng(0)
    dense = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"gate": (128, 64), "up": (128, 64), "down": (64, 128)}.items()
    }
    save_file(
        {**kept, **{f"model.layers.1.mlp.{name}_proj.weight": values for name, values in dense.items()}},
        folder / "model.safetensors",
    )
    model = load_model(folder, mask_id=245)
    assert model.config.experts is not None and model.config.experts.dense_layers == (1,)
    np.testing.assert_array_equal(model.params["dense"]["down"]["kernel"][0], dense["down"].T)
    wanted = tensors["model.layers.2.mlp.experts.5.up_proj.weight"].T
    np.testing.assert_array_equal(model.params["mixture"]["up"]["kernel"][1, 5], wanted)


def test_sdar_with_experts_has_the_names_of_qwen3_moe(tmp_path: Path) -> None:
    plain = families.load("sdar").config
    config = dataclasses.replace(plain, experts=Experts(6, 2, 24, dense_layers=(1,), renormalise=True))
    params = init(config, jax.random.key(0))
    tensors = {}
    mapping = tensor_map(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        key = tuple(entry.key for entry in path)
        axes = mapping.stack_axes(key)
        for place, name in zip(np.ndindex(leaf.shape[:axes]), mapping.stored(key, leaf.shape), strict=True):
            values = np.asarray(leaf[place])
            tensors[name] = np.ascontiguousarray(values.T if key[-1] == "kernel" else values)
    assert {"model.layers.0.mlp.gate.weight", "model.layers.2.mlp.experts.5.down_proj.weight"} <= tensors.keys()
    assert "model.layers.1.mlp.gate_proj.weight" in tensors
    folder = _changed(
        "sdar", tmp_path / "model", model_type="sdar_moe", num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1], decoder_sparse_step=1,
    )  # fmt: skip
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder)
    assert model.config == config and isinstance(model.config, ModelConfig)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


def test_the_published_mask_tokens_and_blocks() -> None:
    for name, published in {"sdar": 257, "llada2": 245}.items():
        config = families.load(name).config
        assert config.block_causal and config.mask_id == published
    assert families.load("sdar").config.block_length == 4 and families.load("llada2").config.block_length == 32
    a2d = families.load("a2d-qwen3", block_causal=True).config
    assert a2d.block_causal and a2d.padded_prompt and not families.load("a2d-qwen3").config.block_causal
