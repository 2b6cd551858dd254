"""Reading a Hugging Face checkpoint folder: `config.json` and safetensors, streamed into stacked arrays.

One part of one stacked parameter is assembled at a time and moved to its devices before the next. Only the bytes that
this process's devices need are read. So host memory never holds a second copy of the model, and not even a whole copy
if the model is sharded over processes. Nothing is unpickled, and no code from a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from bicache_jax.checkpoints.eight_bits import SCALE, EightBits
from bicache_jax.checkpoints.fields import TensorMap, read_json
from bicache_jax.checkpoints.fingerprint import fingerprint
from bicache_jax.checkpoints.finite import WeightCheck
from bicache_jax.checkpoints.other_formats import no_weights, not_safetensors, refuse_quantised
from bicache_jax.checkpoints.targets import Target
from bicache_jax.checkpoints.tree import Finish, as_it_is, paths, tree_of
from bicache_jax.core.config import Quantize
from bicache_jax.core.types import BicacheError

# Weights of other types are quantised and cannot be used without their scales.
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


def _dtypes(name: str, dtype: Any) -> tuple[str, ...]:
    """Types that a tensor may have which is loaded as `dtype`."""
    if dtype == np.int8:
        return ("I8",)
    return ("F32",) if name.endswith(SCALE) else _WEIGHT_DTYPES


class SafetensorsFolder:
    """Tensors of a checkpoint folder by name, from one file or several; files are opened once and read lazily.

    Attributes:
        folder: its path.
        quantize: format of the weights.
        bytes_read: bytes of tensors read so far.
    """

    def __init__(self, folder: Path, eight: EightBits | None = None):
        """Reads headers only.

        Args:
            folder: its path.
            eight: what its `config.json` says of 8-bit weights; None: its tensors are floats.

        Raises:
            BicacheError: there is no safetensors file, a file cannot be read, or the index names a missing file.
        """
        self.folder, self._eight = folder, eight
        self.quantize: Quantize = "none" if eight is None else eight.format
        self.bytes_read = 0
        index, single = folder / "model.safetensors.index.json", "model.safetensors"
        if (folder / single).is_file():  # as the Hub's libraries do; other files are then not part of the model
            files = [single]
        elif index.exists():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise BicacheError(f"{index}: no object 'weight_map'; download the index file again")
            files = sorted({str(name) for name in listed.values()})
            absent = [name for name in files if not (folder / name).is_file()]
            if absent:
                raise BicacheError(
                    f"{folder}: shards named in {index.name} are missing: {', '.join(absent)}; download them, too"
                )
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise BicacheError(f"{folder}: {no_weights(folder)}")
        self._stack = contextlib.ExitStack()
        self._where: dict[str, Any] = {}
        for name in files:
            try:
                handle = self._stack.enter_context(safe_open(folder / name, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise BicacheError(not_safetensors(folder / name, error)) from None
            for tensor in handle.keys():
                if tensor in self._where:
                    raise BicacheError(f"{folder / name}: tensor {tensor!r} is in another file of the folder, too")
                self._where[tensor] = handle

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors but the scales of 8-bit ones."""
        return (
            self.all_names
            if self._eight is None
            else frozenset(name for name in self.all_names if not name.endswith(SCALE))
        )

    @property
    def all_names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._where)

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype name and shape, without reading the tensor."""
        view = self._where[name].get_slice(name)
        return str(view.get_dtype()), tuple(view.get_shape())

    def mark(self, fields: Mapping[str, Any]) -> str:
        """The checkpoint's fingerprint, of 8-bit weights that of the floats that they were made from.

        Args:
            fields: those of its `config.json`, without `quantization_config`.

        Raises:
            BicacheError: 8-bit weights are not those that were written with the `config.json`.
        """
        found = self.contents(fields)
        if self._eight is None:
            return found
        if found != self._eight.contents:
            raise BicacheError(
                f"{self.folder}: config.json or tensors are not those that 'bicache convert' wrote; convert the model"
                " again"
            )
        return self._eight.fingerprint

    def contents(self, fields: Mapping[str, Any]) -> str:
        """The fingerprint of the folder as it is; `fields` as in `mark`."""
        headers = {name: self.header(name) for name in sorted(self.all_names)}
        scales = [name for name in headers if self._eight is not None and name.endswith(SCALE)]
        vectors = [name for name, (_, shape) in headers.items() if len(shape) == 1 and name not in scales]
        # Norms, by the names that PyTorch gives them; other vectors, in families without; else everything.
        vectors = [name for name in vectors if name.endswith("weight")] or vectors or list(headers)
        vectors += [name for name in scales if name not in vectors]
        return fingerprint(fields, headers, [(name, self.read(name)) for name in vectors])

    def load(
        self, mapping: TensorMap, wanted: Mapping[str, Any], *, check: bool = False, finish: Finish = as_it_is
    ) -> dict[str, Any]:
        """`load_params` for this folder."""
        return load_params(self, mapping, wanted, check=check, finish=finish)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a part of a tensor; other parts are not read.

        Args:
            name: the tensor.
            index: one slice per axis; empty: the whole tensor.
        """
        view = self._where[name].get_slice(name)
        part = view[index or tuple(slice(0, size) for size in view.get_shape())]
        self.bytes_read += part.nbytes
        return part


def load_params(
    tensors: SafetensorsFolder,
    mapping: TensorMap,
    wanted: Mapping[str, Any],
    *,
    check: bool = False,
    finish: Finish = as_it_is,
) -> dict[str, Any]:
    """Streams a checkpoint into stacked arrays.

    Args:
        tensors: the folder.
        mapping: checkpoint names of the parameters.
        wanted: a tree of `Target`.
        check: look for NaN and infinity.
        finish: what becomes of each parameter once it is loaded, before the next one is.

    Returns:
        The parameter tree.

    Raises:
        BicacheError: tensors are missing, extra, misshaped, not floats, or (if checked) not finite; the message names
            them.
    """
    leaves = dict(paths(wanted))
    layers = max((leaf.shape[0] for path, leaf in leaves.items() if mapping.stack_axes(path)), default=0)
    if layers > len(tensors.names):  # report the wrong number, not a list of missing tensors
        raise BicacheError(f"{tensors.folder}: config.json has {layers} layers, for {len(tensors.names)} tensors")
    if tensors.quantize == "none":
        refuse_quantised(tensors.folder, tensors.all_names)
    plan = {path: mapping.stored(path, leaf.shape) for path, leaf in leaves.items()}
    faults: list[str] = []
    for path, leaf in leaves.items():
        shape = leaf.shape[mapping.stack_axes(path) :]
        expected = shape[::-1] if path[-1] in mapping.transposed else shape
        if path in mapping.rows:
            expected = (mapping.rows[path][1], *expected[1:])
        for name in plan[path]:
            if name not in tensors.all_names:
                faults.append(f"missing {name}")
                continue
            dtype, found = tensors.header(name)
            if found != expected:
                faults.append(f"misshaped {name}: {list(found)}, expected {list(expected)}")
            wanted_dtypes = _dtypes(name, leaf.dtype)
            if dtype not in wanted_dtypes:
                faults.append(f"unsupported {name}: {dtype}, expected {' or '.join(wanted_dtypes)}")
    known = {name for names in plan.values() for name in names}
    faults += [f"extra {name}" for name in sorted(tensors.all_names - known) if not name.endswith(mapping.ignored)]
    if faults:
        raise BicacheError(f"{tensors.folder}: tensors do not fit config.json: " + "; ".join(faults))
    weights = WeightCheck(tensors.folder, wanted=check)

    def load(path: tuple[str, ...], leaf: Target) -> jax.Array:
        read = functools.partial(read_part, tensors, mapping, path, leaf.shape, leaf.dtype)
        return weights.look(leaf.place(read), plan[path])

    params = tree_of(found for path, leaf in leaves.items() for found in finish(path, load(path, leaf)))
    weights.finish()
    return params


def read_part(
    tensors: SafetensorsFolder,
    mapping: TensorMap,
    path: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: Any,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Reads a part of a parameter, from the same part of each of its tensors.

    Args:
        tensors: the folder.
        mapping: checkpoint names of the parameters.
        path: the parameter.
        shape: its shape in the checkpoint.
        dtype: dtype of the result.
        index: one slice per axis, with start and stop.

    Raises:
        BicacheError: a scale of 8-bit weights is none.
    """
    axes, transposed = mapping.stack_axes(path), path[-1] in mapping.transposed
    array = np.empty([part.stop - part.start for part in index], dtype)
    inner = index[axes:][::-1] if transposed else index[axes:]
    first = mapping.rows.get(path, (0, 0))[0]
    if first:
        inner = (slice(inner[0].start + first, inner[0].stop + first), *inner[1:])
    names = np.asarray(mapping.stored(path, shape), object).reshape(shape[:axes])[index[:axes]]
    for place, name in np.ndenumerate(names):
        part = tensors.read(name, inner)
        if name.endswith(SCALE) and not (np.isfinite(part) & (part > 0)).all():
            raise BicacheError(f"{tensors.folder}: scales in {name} are not positive: damaged; convert the model again")
        with np.errstate(over="ignore"):  # what float16 cannot hold is found by `WeightCheck`
            array[place] = part.T if transposed else part
    return array
