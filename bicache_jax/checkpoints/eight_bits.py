"""8-bit weights in Hugging Face layout.

X.weight          int8, the shape of the float tensor, outputs first
X.weight_scale    float32, one for each row: the float tensor is `weight * weight_scale[..., None]`
config.json       "quantization_config": {"quant_method": "bicache", "version": 1, "format": "w8" or "w8a8", ...}

Projections, experts, embedding and head are so; all other tensors are floats. `fingerprint` there is that of the
checkpoint that it was made from, `contents` one of the folder itself (its other fields, the headers of its tensors,
norms and scales), by which a folder is known that was changed since. Libraries that know other methods only refuse this
one or say that they skip it, and do not take integers for weights unasked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bicache_jax.checkpoints.fields import TensorMap, read_json
from bicache_jax.core.config import QUANTIZE, Quantize
from bicache_jax.core.types import BicacheError

FIELD = "quantization_config"
METHOD = "bicache"
VERSION = 1
SCALE = "_scale"


@dataclasses.dataclass(frozen=True)
class EightBits:
    """What a `config.json` says of 8-bit tensors.

    Attributes:
        format: how they are multiplied.
        fingerprint: of the checkpoint that they were made from.
        contents: fingerprint of the folder.
    """

    format: Quantize
    fingerprint: str
    contents: str

    def to_json(self) -> dict[str, Any]:
        """The field of `config.json`."""
        return {"quant_method": METHOD, "version": VERSION, **dataclasses.asdict(self)}


def eight_bits_of(folder: Path) -> EightBits | None:
    """What a checkpoint's `config.json` says of 8-bit weights that `bicache convert` wrote; None: nothing.

    Raises:
        BicacheError: it is damaged, or of another release.
    """
    source = folder / "config.json"
    found = read_json(source).get(FIELD)
    if not isinstance(found, Mapping) or found.get("quant_method") != METHOD:
        return None
    if found.get("version") != VERSION:
        raise BicacheError(
            f"{source}: {FIELD} has version {found.get('version')!r:.40}, which is not of this release, which reads"
            f" {VERSION}; convert the model again"
        )
    formats = {word: word for word in QUANTIZE if word != "none"}
    try:
        return EightBits(formats[found["format"]], str(found["fingerprint"]), str(found["contents"]))
    except (KeyError, TypeError) as error:
        raise BicacheError(f"{source}: {FIELD} is damaged ({error}); convert the model again") from None


def without_format(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `config.json` without what `bicache convert` says of 8-bit weights."""
    found = fields.get(FIELD)
    mine = isinstance(found, Mapping) and found.get("quant_method") == METHOD
    return {name: value for name, value in fields.items() if not (mine and name == FIELD)}


def scale_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """Where the scales of an 8-bit parameter are in the tree."""
    *above, name = path
    return (*above, "scale") if name in ("kernel", "weight") else (f"{name}{SCALE}",)


def with_scales(mapping: TensorMap, eight: Iterable[tuple[str, ...]]) -> TensorMap:
    """A map in which the scales of these parameters have their tensors beside theirs."""
    pairs = [(path, scale_path(path)) for path in eight]
    return dataclasses.replace(
        mapping,
        names={**mapping.names, **{scale: f"{mapping.names[path]}{SCALE}" for path, scale in pairs}},
        rows={**mapping.rows, **{scale: mapping.rows[path] for path, scale in pairs if path in mapping.rows}},
    )
