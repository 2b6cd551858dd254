"""Folders that hold something else than a model: a line that says what they are and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bicache_jax import BicacheError, load_model
from bicache_jax.cli import main


def _config_only(folder: Path, **fields: Any) -> None:
    checkpoint_files.llada(folder, **fields)
    (folder / "model.safetensors").unlink()


def _adapter(folder: Path) -> None:
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {"base_model.model.q_proj.lora_A.weight": np.zeros((8, 32), np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")


def _adapter_beside(folder: Path) -> None:
    checkpoint_files.llada(folder)
    (folder / "adapter_config.json").write_text("{}")


def _with_tensors(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        checkpoint_files.llada(folder)
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: np.zeros(3, np.float32) for name in names}, folder / "model.safetensors")

    return make


def _files(*names: str, config: bool = False, content: bytes = b"x") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _config_only(folder) if config else folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return make


def _index_alone(folder: Path) -> None:
    checkpoint_files.llada(folder, shards=2)
    for file in folder.glob("*.safetensors"):
        file.unlink()


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "LoRA": (_adapter, "holds a LORA adapter of GSAI-ML/LLaDA-8B-Instruct .*merge it into its base model first"),
    "a model and an adapter": (_adapter_beside, "holds a LoRA adapter .* beside a model: merge it"),
    "fp8 by its config": (
        lambda folder: checkpoint_files.llada(folder, quantization_config={"quant_method": "fp8"}),
        r"config\.json: not supported here: quantised weights: name the folder .*'fp8'",
    ),
    "fp8 by its tensors": (
        _with_tensors("model.transformer.blocks.1.q_proj.weight_scale_inv"),
        r"quantised by fp8 \(tensor model\.transformer\.blocks\.1\.q_proj\.weight_scale_inv\): name the folder",
    ),
    "GPTQ by its tensors": (_with_tensors("x.qweight", "x.qzeros"), r"quantised by GPTQ or AWQ \(tensor x.qweight\)"),
    "bitsandbytes": (_with_tensors("x.weight.absmax", "x.weight.quant_map"), r"quantised by bitsandbytes"),
    "AWQ by its file": (_files("quant_config.json", config=True), r"quantised by AWQ \(quant_config.json\)"),
    "pickle": (_files("pytorch_model.bin", config=True), r"pickled \(pytorch_model.bin\).*safe_serialization=True"),
    "pickle in shards": (_files("pytorch_model-00001-of-00002.bin", config=True), "pickled .*-00001-of-"),
    "Meta's pickle": (_files("consolidated.00.pth", config=True), r"pickled \(consolidated\.00\.pth\)"),
    "pickle alone": (_files("model.pt"), r"pickled weights \(model\.pt\) without a config\.json.*safe_serialization"),
    "GGUF": (_files("llada-q4_k_m.gguf"), r"a model in GGUF \(llada-q4_k_m\.gguf\).*Hugging Face layout"),
    "GGUF with a config": (_files("llada.gguf", config=True), r"weights are in GGUF \(llada\.gguf\)"),
    "Flax": (_files("flax_model.msgpack", config=True), r"Flax's or TensorFlow's \(flax_model.msgpack\)"),
    "no weights": (_config_only, r"no \*\.safetensors file in it; download the weights"),
    "an index alone": (_index_alone, "model-00001-of-00002.safetensors, model-00002-of-.*; download them"),
    "weights alone": (_files("model.safetensors"), r"weights \(model\.safetensors\) without a config\.json"),
    "diffusers": (_files("model_index.json", "unet/config.json"), "a diffusers pipeline"),
    "a level too high": (_files("checkpoint-500/config.json"), r"in a folder inside: name .*/checkpoint-500$"),
    "two levels": (_files("a/config.json", "b/config.json"), r"name .*/a \(or another of 2\)$"),
    "hub cache": (_files("snapshots/0123abc/config.json", "refs/main"), r"name .*/snapshots/0123abc$"),
    "orbax of others": (_files("_METADATA", "manifest.ocdbt"), r"orbax checkpoint \(_METADATA\) that 'bicache"),
    "Git LFS": (
        _files("model.safetensors", config=True, content=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"model\.safetensors: a pointer of Git LFS.*git lfs pull",
    ),
    "empty": (_files(), r"no config\.json in it; name the folder"),
    "Qwen": (
        lambda folder: _config_only(folder, model_type="qwen2"),
        "'qwen2', a causal language model.*llada, llada_moe, dream",
    ),
    "BERT": (
        lambda folder: _config_only(folder, model_type="bert"),
        "model_type is 'bert', supported: llada, llada_moe, dream",
    ),
    "no family": (lambda folder: _config_only(folder, model_type=None), "'model_type' is missing, supported"),
}


@pytest.mark.parametrize(("make", "words"), CASES.values(), ids=CASES)
def test_a_line_says_what_it_is_and_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Callable[[Path], Any], words: str
) -> None:
    make(tmp_path / "model")
    with pytest.raises(BicacheError, match=words) as caught:
        load_model(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)
    assert main(["convert", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err.count("\n") == 1
