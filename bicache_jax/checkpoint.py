"""Reading a Hugging Face checkpoint folder: `config.json` and safetensors, streamed into stacked arrays.

One stacked parameter is assembled at a time and handed to the device before the next begins, so that host memory never
holds a second copy of the model. Nothing is ever unpickled, and no code of a checkpoint is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from bicache_jax.types import BicacheError

_ABSENT = object()


def read_field(
    fields: Mapping[str, Any],
    name: str,
    source: str,
    kind: type | None = None,
    *,
    default: Any = _ABSENT,
    allowed: tuple[Any, ...] | None = None,
) -> Any:
    """A field of a `config.json`, checked; null counts as absent.

    Raises:
        BicacheError: it is missing without a default, of the wrong type, not positive, or not among `allowed`.
    """
    value = fields.get(name)
    if value is None:
        if default is _ABSENT:
            raise BicacheError(f"{source}: field {name!r} is missing")
        return default
    if kind is not None:
        number = kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float)
        if kind is int:
            number = number and isinstance(value, int)
        if not (number if kind in (int, float) else isinstance(value, kind)):
            raise BicacheError(f"{source}: field {name!r} must be {kind.__name__}, got {value!r}")
        if number and value < 0:
            raise BicacheError(f"{source}: field {name!r} must not be negative, got {value!r}")
    if allowed is not None and value not in allowed:
        raise BicacheError(f"{source}: field {name!r} is {value!r}, supported: {', '.join(map(repr, allowed))}")
    return value


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """Where each parameter stands in a checkpoint.

    Attributes:
        names: path in the parameter tree -> tensor name; `{layer}` stands for the layer number of a stacked parameter.
            A parameter called `kernel` is stored transposed, `[out, in]`.
        ignored: suffixes of tensor names that hold no parameter.
    """

    names: Mapping[tuple[str, ...], str]
    ignored: tuple[str, ...] = ()


class SafetensorsFolder:
    """Tensors of a checkpoint folder by name, single or sharded file; files are opened once and read lazily."""

    def __init__(self, folder: Path):
        """Reads headers only.

        Raises:
            BicacheError: no safetensors file, a file that cannot be read, or an index that names a missing file.
        """
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict):
                raise BicacheError(f"{index}: no object 'weight_map'; download the index file again")
            files = sorted({str(name) for name in listed.values()})
            absent = [name for name in files if not (folder / name).is_file()]
            if absent:
                raise BicacheError(f"{folder}: shards named in {index.name} are missing: {', '.join(absent)}")
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise BicacheError(f"{folder}: no *.safetensors file; pickled checkpoints are not read, convert them first")
        self._stack = contextlib.ExitStack()
        self._where: dict[str, Any] = {}
        for name in files:
            try:
                handle = self._stack.enter_context(safe_open(folder / name, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise BicacheError(f"{folder / name}: not a readable safetensors file ({error})") from None
            for tensor in handle.keys():
                if tensor in self._where:
                    raise BicacheError(f"{folder / name}: tensor {tensor!r} stands in another file of the folder too")
                self._where[tensor] = handle

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._where)

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype name and shape, nothing read."""
        view = self._where[name].get_slice(name)
        return str(view.get_dtype()), tuple(view.get_shape())

    def tensor(self, name: str) -> np.ndarray:
        """The tensor, copied from the file."""
        return self._where[name].get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BicacheError: the file cannot be read, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise BicacheError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise BicacheError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BicacheError(f"{path}: must hold a JSON object")
    return value


def _paths(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, name))
        else:
            yield (*above, name), value


def load_params(
    tensors: SafetensorsFolder,
    mapping: TensorMap,
    abstract: Mapping[str, Any],
    put: Callable[[tuple[str, ...], np.ndarray], Any] = lambda path, array: jax.numpy.asarray(array),
) -> dict[str, Any]:
    """Streams a checkpoint into stacked arrays.

    Args:
        tensors: the folder.
        mapping: checkpoint names of the parameters.
        abstract: shapes and dtypes wanted, as `models.abstract` gives them.
        put: takes a finished host array to its device.

    Returns:
        The parameter tree.

    Raises:
        BicacheError: tensors are missing, extra or misshaped; all of them are named.
    """
    wanted = dict(_paths(abstract))
    plan: dict[tuple[str, ...], list[str]] = {}
    faults: list[str] = []
    for path, leaf in wanted.items():
        stacked = path[0] == "layers"
        plan[path] = [mapping.names[path].format(layer=i) for i in range(leaf.shape[0] if stacked else 1)]
        shape = leaf.shape[1:] if stacked else leaf.shape
        expected = shape[::-1] if path[-1] == "kernel" else shape
        for name in plan[path]:
            if name not in tensors.names:
                faults.append(f"missing {name}")
            elif (found := tensors.header(name)[1]) != expected:
                faults.append(f"misshaped {name}: {list(found)}, expected {list(expected)}")
    known = {name for names in plan.values() for name in names}
    faults += [f"extra {name}" for name in sorted(tensors.names - known) if not name.endswith(mapping.ignored)]
    if faults:
        raise BicacheError(f"{tensors.folder}: tensors do not fit config.json: " + "; ".join(faults))

    params: dict[str, Any] = {}
    for path, names in plan.items():
        leaf = wanted[path]
        array = np.empty(leaf.shape, leaf.dtype)
        for place, name in enumerate(names):
            tensor = tensors.tensor(name)
            (array if path[0] != "layers" else array[place])[...] = tensor.T if path[-1] == "kernel" else tensor
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = put(path, array)
    return params
