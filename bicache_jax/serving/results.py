"""Formats of results: our own, OpenAI's batch output, and scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from bicache_jax.core.types import Record, native
from bicache_jax.serving.openai import to_openai

FORMATS = ("native", "openai")


@dataclasses.dataclass(frozen=True)
class ResultFormat:
    """How results are written.

    Attributes:
        name: `native`, a line for each result, or `openai`, a line for each request.
        model: what the lines of the second call the model.
    """

    name: str = "native"
    model: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What lines depend on besides the results, by the names the user knows."""
        return {"output_format": self.name} | ({"model_name": self.model} if self.name == "openai" else {})

    def lines(self, records: Iterable[Record | None]) -> Iterator[Record | None]:
        """Results as the lines that are written.

        Args:
            records: results in input order, as journals keep them; None where the next one is not there yet, which is
                passed on.
        """
        if self.name == "openai":
            return to_openai(records, model=self.model)
        return (None if record is None else native(record) for record in records)


@dataclasses.dataclass(frozen=True)
class ScoreFormat(ResultFormat):
    """How scores are written: the fields of `Score.to_json`."""

    @property
    def identity(self) -> dict[str, Any]:
        """Nothing: lines are what journals keep."""
        return {}

    def lines(self, records: Iterable[Record | None]) -> Iterator[Record | None]:
        """Scores without what journals and results have besides; `records` as in `ResultFormat.lines`."""
        for record in records:
            if record is None:
                yield None
            elif record["finish_reason"] == "error":
                yield {name: record[name] for name in ("id", "error")}
            else:
                yield {name: value for name, value in record.items() if name not in ("sample", "finish_reason")}
