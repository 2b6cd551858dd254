"""8-bit weights as safetensors: there and back, what the files hold, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import golden
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bicache_jax import BicacheError, load_model
from bicache_jax.checkpoints.eight_bits import FIELD
from bicache_jax.convert import convert

LAYER = "model.transformer.blocks.1.ff_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaDA's golden checkpoint in 8 bits."""
    made = tmp_path_factory.mktemp("eight") / "w8a8"
    convert(golden.FOLDERS["llada"], made, to="safetensors", quantize="w8a8", dtype="bfloat16")
    return made


def same(left: Any, right: Any) -> None:
    assert left.config == right.config and left.fingerprint == right.fingerprint
    jax.tree.map(np.testing.assert_array_equal, left.params, right.params)


def test_there_and_back(folder: Path, tmp_path: Path) -> None:
    wanted = load_model(golden.FOLDERS["llada"], quantize="w8a8", dtype="bfloat16")
    same(load_model(folder, dtype="bfloat16"), wanted)
    convert(folder, tmp_path / "orbax", dtype="bfloat16")
    same(load_model(tmp_path / "orbax", dtype="bfloat16"), wanted)
    assert FIELD not in json.loads((tmp_path / "orbax" / "config.json").read_text())
    convert(tmp_path / "orbax", tmp_path / "again", to="safetensors", dtype="bfloat16")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


def test_the_files_hold_what_is_documented(folder: Path) -> None:
    tensors, floats = load_file(folder / "model.safetensors"), load_file(golden.FOLDERS["llada"] / "model.safetensors")
    assert {name.removesuffix("_scale") for name in tensors} == set(floats)
    for name, exact in floats.items():
        if name.endswith("norm.weight") or "ln_f" in name:
            assert f"{name}_scale" not in tensors
            continue
        whole, scale = tensors[name], tensors[f"{name}_scale"]
        assert (whole.dtype, whole.shape, scale.shape) == (np.int8, exact.shape, exact.shape[:1])
        assert (np.abs(whole * scale[:, None] - exact) <= 0.51 * scale[:, None] + 0.01 * np.abs(exact)).all()
    said = json.loads((folder / "config.json").read_text())[FIELD]
    assert (said["quant_method"], said["format"]) == ("bicache", "w8a8")


def test_experts_and_rows_of_one_tensor(tmp_path: Path) -> None:
    """LLaDA2 keeps queries, keys and values in one tensor, and so are their scales."""
    settings: dict[str, Any] = {"mask_id": families.recorded("llada2")["mask_token_id"], "dtype": "float32"}
    convert(families.FOLDERS["llada2"], tmp_path / "w8", to="safetensors", quantize="w8", **settings)
    same(load_model(tmp_path / "w8", **settings), load_model(families.FOLDERS["llada2"], quantize="w8", **settings))


def _tensor(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def _said(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        fields[FIELD] |= changes
        (folder / "config.json").write_text(json.dumps(fields))

    return apply


def _unsaid(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    del fields[FIELD]
    (folder / "config.json").write_text(json.dumps(fields))


def _set(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return _tensor(lambda tensors: tensors.update({name: value(tensors[name])}))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (_tensor(lambda tensors: tensors.pop(f"{LAYER}_scale")), f"missing {LAYER}_scale"),
        (_set(LAYER, lambda x: x.astype(np.float32)), f"unsupported {LAYER}: F32, expected I8"),
        (_set(f"{LAYER}_scale", lambda x: x.astype(np.float16)), f"unsupported {LAYER}_scale: F16, expected F32"),
        (_set(f"{LAYER}_scale", lambda x: x[:-1]), f"misshaped {LAYER}_scale"),
        (_set(f"{LAYER}_scale", lambda x: x * 0), f"scales in {LAYER}_scale are not positive: damaged"),
        (_set(f"{LAYER}_scale", lambda x: 2 * x), "are not those that 'bicache convert' wrote"),
        (_said(version=2), "has version 2, which is not of this release"),
        (_said(format="w4"), f"config.json: {FIELD} is damaged"),
        (_said(quant_method="fp8"), "quantised weights"),
        (_unsaid, "expected F64, F32, F16 or BF16|quantised by"),
    ],
)
def test_what_is_damaged_or_foreign_is_refused_in_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], fault: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(BicacheError, match=fault) as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)


def test_formats_of_it(folder: Path) -> None:
    assert load_model(folder, quantize="w8").config.quantize == "w8"  # the same weights
    with pytest.raises(BicacheError, match="its weights are stored in 8 bits"):
        load_model(folder, quantize="none")
