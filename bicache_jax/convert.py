"""Converting checkpoints between the Hugging Face layout and orbax folders, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from bicache_jax.checkpoints.eight_bits import FIELD, EightBits, without_format
from bicache_jax.checkpoints.fields import TensorMap, read_json
from bicache_jax.checkpoints.orbax_folder import MANIFEST, OrbaxFolder, write_params
from bicache_jax.checkpoints.safetensors_folder import SafetensorsFolder
from bicache_jax.checkpoints.tree import paths
from bicache_jax.core.config import Quantize
from bicache_jax.core.types import BicacheError
from bicache_jax.loading import find_folder, load_model, open_checkpoint, tensor_map

Format = Literal["orbax", "safetensors"]
FORMATS: tuple[Format, ...] = ("orbax", "safetensors")
FILE_BYTES = 5 * 10**9  # of a safetensors file, as the hub has them


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: Format = "orbax",
    dtype: Any = "auto",
    mask_id: int | None = None,
    quantize: Quantize | None = None,
    check_weights: bool = False,
) -> int:
    """Writes a model in another format, with its config, tokenizer and boundary table.

    Args:
        source: as in `load_model`.
        output: a folder that does not exist yet, or is empty.
        to: format of the output.
        dtype: of the parameters.
        mask_id: as in `load_model`; it is not written anywhere.
        quantize: as in `load_model`; in safetensors as `bicache_jax.checkpoints.eight_bits` says.
        check_weights: as in `load_model`.

    Returns:
        Bytes of the parameters written.

    Raises:
        BicacheError: the model cannot be read, or the output cannot be written.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BicacheError(f"{output} exists already: name a new folder")
    folder = find_folder(source)
    model = load_model(source, dtype=dtype, mask_id=mask_id, quantize=quantize, check_weights=check_weights)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, since only a rename within a file system is atomic.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", ignore_cleanup_errors=True) as t:
            made = Path(t) / "model"
            made.mkdir()
            _copy_side_files(folder, made)
            if to == "orbax":
                with open_checkpoint(folder) as tensors:
                    names = tensors.names
                write_params(
                    made, model.params, fingerprint=model.checkpoint, names=names, quantize=model.config.quantize
                )
                OrbaxFolder(made).verify()
            else:
                _write_safetensors(made, model.params, tensor_map(model.config))
                if model.config.quantize != "none":
                    _write_format(made, EightBits(model.config.quantize, model.checkpoint, ""))
            os.replace(made, target)  # over an empty folder, too
    except OSError as error:
        raise BicacheError(f"cannot write {output}: {error.strerror or error}") from error
    return sum(leaf.nbytes for _, leaf in paths(model.params))


def _copy_side_files(folder: Path, target: Path) -> None:
    """Config, tokenizer and tables: data, never code."""
    for pattern in ("*.json", "*.jinja", "merges.txt", "README.md", "LICENSE*"):
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file.name != MANIFEST and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
    fields = read_json(folder / "config.json")
    if FIELD in fields:  # says how the source holds its weights
        _write_config(target, without_format(fields))


def _write_config(folder: Path, fields: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _write_format(folder: Path, eight: EightBits) -> None:
    """Says in `config.json` that the tensors beside it are 8-bit ones."""
    fields = read_json(folder / "config.json")
    with SafetensorsFolder(folder, eight) as tensors:
        written = dataclasses.replace(eight, contents=tensors.contents(fields))
    _write_config(folder, {**fields, FIELD: written.to_json()})


def _tensors(params: Mapping[str, Any], mapping: TensorMap) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the checkpoint's tensors, one at a time."""
    leaves = dict(paths(params))
    for path, leaf in leaves.items():
        joined = [other for other in leaves if mapping.names[other] == mapping.names[path]]  # rows of one tensor
        joined.sort(key=lambda other: mapping.rows.get(other, (0, 0)))
        if path != joined[0]:
            continue
        axes = mapping.stack_axes(path)
        for place, name in zip(np.ndindex(leaf.shape[:axes]), mapping.stored(path, leaf.shape), strict=True):
            array = np.concatenate([np.asarray(leaves[other][place]) for other in joined])
            yield name, np.ascontiguousarray(array.T if path[-1] in mapping.transposed else array)


def _write_safetensors(folder: Path, params: Mapping[str, Any], mapping: TensorMap) -> None:
    """Writes files of at most `FILE_BYTES`, with an index if there are several."""
    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        if held:
            file = folder / f"part-{len(files):05d}.safetensors"
            save_file(held, file, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", file)  # the library lets nobody else read it
            files.append(list(held))
            held.clear()

    for name, array in _tensors(params, mapping):
        if sum(other.nbytes for other in held.values()) + array.nbytes > FILE_BYTES:
            flush()
        held[name] = array
    flush()
    if len(files) == 1:
        os.replace(folder / "part-00000.safetensors", folder / "model.safetensors")
        return
    final = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for number, name in enumerate(final):
        os.replace(folder / f"part-{number:05d}.safetensors", folder / name)
    index = {
        "metadata": {"total_size": sum(leaf.nbytes for _, leaf in paths(params))},
        "weight_map": {tensor: file for file, tensors in zip(final, files, strict=True) for tensor in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
