"""Boundary tables: how deep a prefix's KV may be reused, by the prefix's share of the sequence.

A table is made by `bicache profile` for one model, which it names by a fingerprint; see BiCache, arXiv 2606.07571,
section 4.2. It is made by similarity, as published, or by answers (`bicache_jax.measure.by_answers`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from bicache_jax.core.config import CRITERIA, Criterion
from bicache_jax.core.table import Table
from bicache_jax.core.types import BicacheError, Model


@dataclasses.dataclass(frozen=True)
class BoundaryTable:
    """A boundary table and where it comes from.

    Attributes:
        model: name of the model it was made for.
        fingerprint: that model's fingerprint; empty in published tables.
        num_layers: L of that model.
        threshold: mean cosine similarity from which a layer counts as shallow; in a table by answers it decides
            nothing, and is that of the boundary by similarity which stands beside its evidence.
        samples_per_ratio: sequences measured at each ratio, the fewest of any.
        table: b by r in percent, non-decreasing.
        similarity: mean similarity of each layer by r, where it is known.
        source: where a published table was published.
        criterion: what its boundaries were chosen by.
        refresh_interval: the longest one that keeps answers within the bound, where one was looked for. It is advice:
            `refresh_interval="auto"` does not read it.
        answers: evidence of a table by answers: `max_loss` (as a share), `confidence`, `refresh_interval` (at which
            boundaries were tested), `requests`, `with_answers`, `decodes`, and what was `tested`, `by_ratio` and
            `by_interval` (fields of `bicache_jax.measure.by_answers.Evidence`).
    """

    model: str
    fingerprint: str
    num_layers: int
    threshold: float
    samples_per_ratio: int
    table: Mapping[int, int] = dataclasses.field(hash=False)
    similarity: Mapping[int, tuple[float, ...]] | None = dataclasses.field(default=None, hash=False)
    source: str | None = None
    criterion: Criterion = "similarity"
    refresh_interval: int | None = None
    answers: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    def boundary(self, ratio: int) -> int:
        """The boundary at the largest listed ratio that is not above `ratio`; 0 if there is none."""
        return boundary_at(self.table, ratio)

    def doubt(self, model: Model) -> str | None:
        """What a user should know who uses the table for this model; None where it is the model's own.

        Raises:
            BicacheError: the table is for a model of another depth.
        """
        layers = model.config.num_layers
        if self.num_layers != layers:
            raise BicacheError(f"is for a model of {self.num_layers} layers, and {model.name} has {layers}")
        if self.fingerprint and self.fingerprint.partition("+")[0] != model.checkpoint:
            return f"was made for another checkpoint ({self.model})"
        return None

    def _repr_html_(self) -> str:
        ratios = sorted(self.table)
        heads = ("prefix ratio r, %", *map(str, ratios))
        chosen = f"similarity above {self.threshold:g}"
        if self.answers is not None:
            chosen = f"by answers, loss at most {100 * self.answers['max_loss']:.3g} points"
        above = f"{self.model}: {self.num_layers} layers, {chosen}"
        return Table(heads, [("boundary b", *(self.table[ratio] for ratio in ratios))], above=(above,))._repr_html_()

    def to_json(self) -> dict[str, Any]:
        """The table as it stands in a file."""
        record = dataclasses.asdict(self)
        record["table"] = {str(ratio): b for ratio, b in sorted(self.table.items())}
        if self.similarity is not None:
            record["similarity"] = {str(ratio): list(values) for ratio, values in sorted(self.similarity.items())}
        return {name: value for name, value in record.items() if value is not None or name == "similarity"}


def clamp_boundary(boundary: Any, num_layers: int) -> Any:
    """The boundary as it is computed with: the top layer's prefix gives K and V alone, so b = L equals b = L - 1.

    Args:
        boundary: b, 0..L; a number or an array.
        num_layers: L.
    """
    top = num_layers - 1
    return min(boundary, top) if isinstance(boundary, int) else jnp.minimum(boundary, top)


def boundary_at(table: Mapping[int, int], ratio: int) -> int:
    """The boundary at the largest listed ratio that is not above `ratio`; 0 if there is none."""
    listed = [key for key in table if key <= ratio]
    return table[max(listed)] if listed else 0


def table_from_json(record: Any, source: str) -> BoundaryTable:
    """Checks a table as it stands in a file.

    Raises:
        BicacheError: it is not a boundary table; the message names `source` and the field.
    """

    def fault(what: str) -> BicacheError:
        return BicacheError(f"{source}: not a boundary table: {what}; make one with 'bicache profile'")

    if not isinstance(record, dict):
        raise fault("must be a JSON object")
    num_layers, entries, similarity = record.get("num_layers"), record.get("table"), record.get("similarity")
    if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
        raise fault(f"'num_layers' must be a positive integer, got {num_layers!r}")
    if not isinstance(entries, dict) or not entries:
        raise fault("'table' must be an object {\"<r>\": b}")
    table: dict[int, int] = {}
    for key, value in entries.items():
        if not (key.isascii() and key.isdigit() and int(key) <= 100):
            raise fault(f"ratio {key!r} must be a whole percentage from 0 to 100")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= num_layers:
            raise fault(f"boundary at {key} must be an integer from 0 to {num_layers}, got {value!r}")
        if int(key) in table:
            raise fault(f"ratio {key!r} is listed twice")
        table[int(key)] = value
    ordered = [table[ratio] for ratio in sorted(table)]
    if ordered != sorted(ordered):
        raise fault("boundaries must not decrease with the ratio")
    if similarity is not None:
        try:
            similarity = {int(ratio): tuple(float(value) for value in values) for ratio, values in similarity.items()}
        except (AttributeError, TypeError, ValueError):
            raise fault("'similarity' must be null or an object {\"<r>\": [one number a layer]}") from None
    threshold, samples = record.get("threshold", 0.0), record.get("samples_per_ratio", 0)
    for name, value in (("threshold", threshold), ("samples_per_ratio", samples)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fault(f"{name!r} must be a number, got {value!r}")
    criterion, interval = record.get("criterion", CRITERIA[0]), record.get("refresh_interval")
    if criterion not in CRITERIA:
        raise fault(f"'criterion' must be one of {', '.join(CRITERIA)}, got {criterion!r:.80}")
    if interval is not None and (not isinstance(interval, int) or isinstance(interval, bool) or interval < 1):
        raise fault(f"'refresh_interval' must be null or a positive integer, got {interval!r:.80}")
    answers = record.get("answers")
    if answers is not None and not (isinstance(answers, dict) and isinstance(answers.get("max_loss"), int | float)):
        raise fault("'answers' must be null or an object with 'max_loss'")
    return BoundaryTable(
        model=str(record.get("model", "")),
        fingerprint=str(record.get("fingerprint") or ""),
        num_layers=num_layers,
        threshold=float(threshold),
        samples_per_ratio=int(samples),
        table=dict(sorted(table.items())),
        similarity=similarity,
        source=record.get("source"),
        criterion=criterion,
        refresh_interval=interval,
        answers=answers,
    )


def load_table(path: str | Path) -> BoundaryTable:
    """Reads a boundary table.

    Raises:
        BicacheError: the file cannot be read or is not a boundary table.
    """
    try:
        record = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise BicacheError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BicacheError(f"{path}: not valid JSON ({error})") from None
    return table_from_json(record, str(path))
