"""What a family file is made of: checked fields of a `config.json`, and the map from parameters to tensor names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bicache_jax.core.types import BicacheError

_ABSENT = object()
_INT_LIMIT = 2**31


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BicacheError: the file cannot be read, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise BicacheError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BicacheError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BicacheError(f"{path}: must hold a JSON object")
    return value


def read_field(
    fields: Mapping[str, Any],
    name: str,
    source: str,
    kind: type | None = None,
    *,
    default: Any = _ABSENT,
    allowed: tuple[Any, ...] | None = None,
    least: int = 1,
) -> Any:
    """A field of a `config.json`, checked; null counts as absent.

    Args:
        fields: the file's fields.
        name: the field.
        source: file name for messages.
        kind: type that it must have.
        default: what an absent field stands for; without one it must be there.
        allowed: the values that are supported; None: all.
        least: smallest integer allowed; other numbers must be positive and finite.

    Raises:
        BicacheError: it is missing without a default, of the wrong type, out of range, or not among `allowed`.
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
        if number and kind is int and not least <= value < _INT_LIMIT:
            raise BicacheError(f"{source}: field {name!r} must be an integer >= {least}, got {value!r}"[:400])
        if number and kind is float and not 0 < value < 1e38:  # the largest float32
            raise BicacheError(f"{source}: field {name!r} must be positive and finite, got {value!r}"[:400])
    if allowed is not None and value not in allowed:
        raise BicacheError(f"{source}: field {name!r} is {value!r}, supported: {', '.join(map(repr, allowed))}")
    return value


def read_ids(fields: Mapping[str, Any], name: str, source: str) -> tuple[int, ...]:
    """Token ids that stand as one number or as a list; null and absence are no ids.

    Raises:
        BicacheError: something in it is no integer.
    """
    value = fields.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise BicacheError(f"{source}: field {name!r} must be a token id or a list of them, got {value!r}"[:400])
    return tuple(ids)


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
