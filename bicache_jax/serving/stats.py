"""What an engine has done, in numbers."""

from __future__ import annotations

import dataclasses

from bicache_jax.core.table import fields_table
from bicache_jax.serving.compilation import CompileCounter


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine has done so far.

    Attributes:
        rows: responses finished (a request with n samples counts n).
        tokens: response tokens made.
        forward_passes: forward passes over rows, encoding not counted; under guidance a row's pass runs its twin too.
        passes_saved: forward passes that early stops spared by schedule; without one, at least as many were spared.
        prefixes_encoded: prefixes run alone.
        prefix_hits: rows that were served by a prefix encoded for an earlier row.
        batches: batches begun: rows that join one under way do not count.
        row_steps: places of the batches times the passes made; of these, `forward_passes` were some row's own.
        dispatches: calls of the decode program.
        compilations: programs compiled in the process since the engine was made.
        compile_seconds: time spent on that, tracing and lowering included.
        seconds: time spent in encode, decode and score, compilation included.
        scored: texts scored.
    """

    rows: int = 0
    tokens: int = 0
    forward_passes: int = 0
    passes_saved: int = 0
    prefixes_encoded: int = 0
    prefix_hits: int = 0
    batches: int = 0
    row_steps: int = 0
    dispatches: int = 0
    compilations: int = 0
    compile_seconds: float = 0.0
    seconds: float = 0.0
    scored: int = 0

    def _repr_html_(self) -> str:
        return fields_table(self)._repr_html_()


class Counters:
    """Counts up while an engine runs."""

    def __init__(self) -> None:
        self._compiles = CompileCounter()
        self._stats = Stats()

    @property
    def stats(self) -> Stats:
        """The counts so far."""
        return dataclasses.replace(
            self._stats, compilations=self._compiles.count, compile_seconds=self._compiles.seconds
        )

    def add(self, **more: float) -> None:
        """Adds to counts by name."""
        now = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = dataclasses.replace(self._stats, **now)
