"""Weights that are no numbers are found while a model is loaded, if one asks for it, and named."""

from __future__ import annotations

from pathlib import Path

import checkpoint_files
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bicache_jax import BicacheError, load_model
from bicache_jax.cli import main
from bicache_jax.convert import convert

BAD = {
    "model.transformer.blocks.1.q_proj.weight": float("nan"),
    "model.transformer.blocks.2.ff_out.weight": float("inf"),
    "model.transformer.ff_out.weight": float("-inf"),
    "model.transformer.ln_f.weight": float("nan"),
}


def _harm(folder: Path, bad: dict[str, float]) -> Path:
    checkpoint_files.llada(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in bad.items():
        tensors[name].flat[-1] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_number_is_enough(tmp_path: Path, bad: str, dtype: str) -> None:
    folder = _harm(tmp_path / "model", {bad: BAD[bad]})
    load_model(folder, dtype=dtype)
    with pytest.raises(BicacheError, match=rf"model: NaN or infinity in {bad}: the checkpoint is damaged"):
        load_model(folder, dtype=dtype, check_weights=True)


def test_all_are_named_up_to_a_few(tmp_path: Path) -> None:
    folder = _harm(tmp_path / "few", BAD)
    with pytest.raises(BicacheError) as caught:
        load_model(folder, check_weights=True)
    assert all(name in str(caught.value) for name in BAD)
    many = [f"model.transformer.blocks.{layer}.{name}_proj.weight" for layer in range(3) for name in "qkv"]
    folder = _harm(tmp_path / "many", dict.fromkeys(many, float("nan")))
    with pytest.raises(BicacheError, match=r"_proj\.weight and 1 more: "):
        load_model(folder, check_weights=True)


def test_a_sound_model_is_the_same_with_and_without(tmp_path: Path) -> None:
    folder = checkpoint_files.llada(tmp_path / "model")
    plain, checked = load_model(folder), load_model(folder, check_weights=True)
    jax.tree.map(np.testing.assert_array_equal, plain.params, checked.params)


def test_orbax_folders_are_looked_at(tmp_path: Path) -> None:  # and meshes by tests/mesh_child.py
    convert(_harm(tmp_path / "model", BAD), tmp_path / "orbax", dtype="float32")
    with pytest.raises(BicacheError) as caught:
        load_model(tmp_path / "orbax", check_weights=True)
    assert all(name in str(caught.value) for name in BAD)


def test_every_command_that_loads_has_the_flag(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(_harm(tmp_path / "model", BAD))
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"prompt_ids": [3, 4, 5], "prefix_len": 2, "answer": "x"}\n')
    output = ["--output", str(tmp_path / "out")]
    for command in (
        ["generate", "--input", str(requests), *output],
        ["convert", *output],
        ["evaluate", "--task", str(requests)],
        ["benchmark"],
        ["profile", "--data", str(requests), "--no-plot", *output],
    ):
        assert main([*command, "--model", folder, "--check-weights"]) == 2
        assert "NaN or infinity in model.transformer." in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
