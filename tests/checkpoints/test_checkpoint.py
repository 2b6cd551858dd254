"""Loading: the Hugging Face layout, single or sharded, and what is said when it does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bicache_jax import BicacheError, load_model
from bicache_jax.models import abstract


def _copy(tmp_path: Path, family: str = "llada", **fields: Any) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(golden.FOLDERS[family] / "model.safetensors", folder)
    config = json.loads((golden.FOLDERS[family] / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", list(golden.FOLDERS))
def test_shards_and_a_single_file_load_alike(tmp_path: Path, family: str) -> None:
    folder = _copy(tmp_path, family)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded, single = load_model(folder), load_model(golden.FOLDERS[family])
    jax.tree.map(np.testing.assert_array_equal, sharded.params, single.params)
    assert sharded.config == single.config
    (folder / "b.safetensors").unlink()
    with pytest.raises(BicacheError, match=r"b\.safetensors"):
        load_model(folder)


def test_bfloat16_checkpoints_and_parameters(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    _rewrite(folder, lambda tensors: tensors.update({k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}))
    model = load_model(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}
    half = load_model(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), model.params, half.params)
    with pytest.raises(BicacheError, match="float16"):
        load_model(folder, dtype="float64")


def test_all_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = _copy(tmp_path)

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.transformer.wte.weight"]
        tensors["surplus"] = np.zeros(3, np.float32)
        tensors["model.transformer.blocks.2.q_proj.weight"] = np.zeros((64, 63), np.float32)
        tensors["model.transformer.rotary_emb.inv_freq"] = np.zeros(3, np.float32)

    _rewrite(folder, change)
    with pytest.raises(BicacheError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "missing model.transformer.wte.weight" in message and "extra surplus" in message
    assert "misshaped model.transformer.blocks.2.q_proj.weight: [64, 63], expected [64, 64]" in message
    assert "inv_freq" not in message and "\n" not in message


def test_biases_grouped_heads_and_tied_embeddings(tmp_path: Path) -> None:
    folder = _copy(tmp_path, n_kv_heads=2, include_bias=True, weight_tying=True)
    rng = np.random.default_rng(0)

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.transformer.ff_out.weight"]
        for name in list(tensors):
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                tensors[name] = tensors[name][:32].copy()
            if "blocks" in name and "norm" not in name:
                tensors[name.replace("weight", "bias")] = rng.normal(size=len(tensors[name])).astype(np.float32)

    _rewrite(folder, change)
    model = load_model(folder)
    assert (model.config.num_kv_heads, model.config.tied, model.config.bias) == (2, True, True)
    shapes = jax.tree.map(jnp.shape, model.params)
    assert shapes == jax.tree.map(jnp.shape, abstract(model.config))
    assert shapes["layers"]["k"] == {"weight": (6, 32, 64), "bias": (6, 32)} and "head" not in shapes


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"d_model": None}, "d_model"),
        ({"n_layers": "six"}, "n_layers"),
        ({"alibi": True}, "alibi"),
        ({"block_type": "sequential"}, "block_type"),
        ({"n_heads": 5}, "n_heads"),
        ({"n_kv_heads": 3}, "num_kv_heads"),
        ({"mask_token_id": 400}, "mask_id"),
        ({"n_layers": 7}, "missing"),
        ({"n_layers": 0}, "n_layers"),
        ({"n_layers": 10**7}, "10000000 layers"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_kv_heads": 0}, "n_kv_heads"),
        ({"d_model": 0}, "d_model"),
        ({"d_model": 10**40}, "d_model"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"mask_token_id": -1}, "mask_token_id"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"eos_token_id": ["1"]}, "eos_token_id"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id"),
        ({"eos_token_id": 1.5}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
    ],
)
def test_faults_of_config_name_the_file_and_the_field(tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(BicacheError, match=word) as caught:
        load_model(_copy(tmp_path, **fields))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, bool])
def test_quantised_tensors_are_refused(tmp_path: Path, dtype: Any) -> None:
    folder = _copy(tmp_path)
    name = "model.transformer.blocks.1.q_proj.weight"
    _rewrite(folder, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    with pytest.raises(BicacheError, match=f"unsupported {name}"):
        load_model(folder)


def test_files_beside_the_model_are_not_the_model(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    save_file({"surplus": np.zeros(3, np.float32)}, folder / "adapter.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    load_model(folder)


def test_ends_of_text_come_from_every_file_that_names_one(tmp_path: Path) -> None:
    folder = _copy(tmp_path, eos_token_id=[4, 7, 4])
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7, 320, -1]}')
    assert load_model(folder).config.eos_ids == (4, 7, 9)
    for bad in ('{"eos_token_id": "x"}', "{", "[" * 100_000):
        (folder / "generation_config.json").write_text(bad)
        with pytest.raises(BicacheError, match=r"generation_config\.json"):
            load_model(folder)


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    assert load_model(_copy(tmp_path, weight_tying=True)).config.tied


def test_the_mask_token_may_be_replaced() -> None:
    assert load_model(golden.FOLDERS["llada"], mask_id=5).config.mask_id == 5


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    for name in ("nowhere", str(tmp_path), str(tmp_path / "config.json"), "a" * 300, "a" * 300 + "/b"):
        with pytest.raises(BicacheError):
            load_model(name)
    folder = _copy(tmp_path)
    (folder / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(BicacheError, match=r"model\.safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BicacheError, match=r"config\.json"):
        load_model(folder)


def test_a_table_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    table = {"model": "m", "fingerprint": "other", "num_layers": 6, "table": {"0": 2}}
    (folder / "boundary_table.json").write_text(json.dumps(table))
    with pytest.raises(BicacheError, match="another checkpoint"):
        load_model(folder)
    table["fingerprint"] = load_model(golden.FOLDERS["llada"]).fingerprint
    (folder / "boundary_table.json").write_text(json.dumps(table))
    assert load_model(folder).boundaries == {0: 2}
