"""Building blocks of a family file: checked fields of a `config.json`, and the map from parameters to tensor names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bicache_jax.checkpoints.known_fields import HARMLESS, UNSUPPORTED, is_off
from bicache_jax.core.types import BicacheError

_ABSENT = object()
_INT_LIMIT = 2**31


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

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


def read_ids(fields: Mapping[str, Any], name: str, source: str) -> tuple[int, ...]:
    """Token ids, given as one number or as a list; empty if the field is null or missing.

    Raises:
        BicacheError: an entry is not an integer.
    """
    value = fields.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise BicacheError(f"{source}: field {name!r} must be a token id or a list of them, got {value!r}"[:400])
    return tuple(ids)


class Fields:
    """Fields of a `config.json`. It records which fields were read, so that no field is silently ignored.

    Attributes:
        source: file name for messages.
    """

    def __init__(self, fields: Mapping[str, Any], source: str, *, supported: Collection[str] = ()) -> None:
        """Checks for unsupported fields.

        Args:
            fields: the fields.
            source: file name for messages.
            supported: those of `UNSUPPORTED` that the family reads.

        Raises:
            BicacheError: a field selects a computation that no family here supports (`UNSUPPORTED`).
        """
        self.source = source
        self._fields = fields
        self._read = {"model_type"}
        faults: dict[str, list[str]] = {}
        for name, value in fields.items():
            if name in UNSUPPORTED and name not in supported and not is_off(name, value):
                faults.setdefault(UNSUPPORTED[name], []).append(f"{name!r} is {_short(value)}")
        if faults:
            listed = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in faults.items())
            raise BicacheError(f"{source}: not supported here: {listed}")

    def read(
        self,
        name: str,
        kind: type | None = None,
        *,
        default: Any = _ABSENT,
        allowed: tuple[Any, ...] | None = None,
        least: int = 1,
    ) -> Any:
        """Reads and checks a field; null counts as missing.

        Args:
            name: the field.
            kind: required type.
            default: value of a missing field; without a default the field is required.
            allowed: supported values; None: all.
            least: smallest integer allowed; other numbers must be positive and finite.

        Raises:
            BicacheError: a required field is missing, has the wrong type, is out of range, or is not in `allowed`.
        """
        self._read.add(name)
        source, value = self.source, self._fields.get(name)
        if value is None:
            if default is _ABSENT:
                raise BicacheError(f"{source}: field {name!r} is missing")
            return default
        if kind is not None:
            number = kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float)
            if kind is int:
                number = number and isinstance(value, int)
            if not (number if kind in (int, float) else isinstance(value, kind)):
                raise BicacheError(f"{source}: field {name!r} must be {kind.__name__}, got {value!r}"[:400])
            if number and kind is int and not least <= value < _INT_LIMIT:
                raise BicacheError(f"{source}: field {name!r} must be an integer >= {least}, got {value!r}"[:400])
            if number and kind is float and not 0 < value < 1e38:  # the largest float32
                raise BicacheError(f"{source}: field {name!r} must be positive and finite, got {value!r}"[:400])
        if allowed is not None and value not in allowed:
            raise BicacheError(
                f"{source}: field {name!r} is {_short(value)}, supported: {', '.join(map(repr, allowed))}"
            )
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """`read_ids` for a field."""
        self._read.add(name)
        return read_ids(self._fields, name, self.source)

    def rope_theta(self, default: float) -> float:
        """Base of the rotary embedding, from any of the fields that releases of transformers use.

        Raises:
            BicacheError: the embedding is rescaled, or two fields disagree.
        """
        theta = self.read("rope_theta", float, default=None)
        for name in ("rope_scaling", "rope_parameters"):
            self._read.add(name)
            if is_off(name, self._fields.get(name)):
                continue
            inside = self.read(name, dict)
            plain = all(inside.get(key) in (None, "default") for key in ("type", "rope_type"))
            others = {key: value for key, value in inside.items() if key not in ("type", "rope_type", "rope_theta")}
            if not plain or not all(is_off(key, value) for key, value in others.items()):
                raise BicacheError(
                    f"{self.source}: not supported here: a rescaled rotary embedding ({name!r} is {_short(inside)})"
                )
            found = Fields(inside, f"{self.source}: {name}").read("rope_theta", float, default=theta)
            if theta is not None and found != theta:
                raise BicacheError(f"{self.source}: rope_theta is {theta!r}, and in field {name!r} it is {found!r}")
            theta = found
        return float(default if theta is None else theta)

    def check_rest(self, harmless: Collection[str] = ()) -> None:
        """Rejects fields that were not read, except values that mean "off" and fields that do not change any result.

        Args:
            harmless: fields that do not change results of this family, in addition to `HARMLESS`.

        Raises:
            BicacheError: fields are left; the message names them.
        """
        known = self._read | HARMLESS.keys() | set(harmless)
        rest = {
            name: value
            for name, value in self._fields.items()
            if name not in known and not name.startswith("_") and not is_off(name, value)
        }
        if rest:
            listed = ", ".join(f"{name!r} ({_short(value)})" for name, value in rest.items())
            raise BicacheError(
                f"{self.source}: unknown field{'s' * (len(rest) > 1)} {listed}: the model may compute what is not"
                " supported here; if you know that it changes no result, remove it from the file"
            )


def _short(value: Any) -> str:
    """A value, shortened for a message of one line."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """Where each parameter is in a checkpoint.

    Attributes:
        names: path in the parameter tree -> tensor name; `{layer}` is the layer number of a stacked parameter, and
            `{expert}` the number of an expert in a second axis.
        ignored: suffixes of tensor names that hold no parameter.
        layers: layers of the stacks that only some layers have, by the first key of their paths.
        rows: paths of parameters that are some rows of their tensor, with the first of these and the tensor's number.
        transposed: last keys of the paths of parameters that are `[in, out]` here and `[out, in]` in the checkpoint.
    """

    names: Mapping[tuple[str, ...], str]
    ignored: tuple[str, ...] = ()
    layers: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    rows: Mapping[tuple[str, ...], tuple[int, int]] = dataclasses.field(default_factory=dict)
    transposed: tuple[str, ...] = ("kernel",)

    def stack_axes(self, path: tuple[str, ...]) -> int:
        """Leading axes of a parameter along which it is made of tensors."""
        name = self.names[path]
        return ("{layer}" in name) + ("{expert}" in name)

    def stored(self, path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
        """Names of the tensors that a parameter of this shape is made of, in the order of its leading axes."""
        name, axes = self.names[path], self.stack_axes(path)
        if not axes:
            return [name]
        layers = self.layers.get(path[0], tuple(range(shape[0])))
        experts = range(shape[1]) if axes > 1 else (0,)
        return [name.format(layer=layer, expert=expert) for layer in layers for expert in experts]
