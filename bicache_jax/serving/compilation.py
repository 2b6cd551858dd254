"""Counting compilations, so that "nothing recompiles" is a measurement; and XLA's persistent compilation cache."""

from __future__ import annotations

import functools
from pathlib import Path

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_totals = {"count": 0, "seconds": 0.0}


@functools.cache
def _listen() -> None:
    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _EVENT:
            _totals["count"] += 1
            _totals["seconds"] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(heard)


class CompileCounter:
    """Compilations of this process since the counter was made; programs taken from the persistent cache count too."""

    def __init__(self) -> None:
        _listen()
        self._start = dict(_totals)

    @property
    def count(self) -> int:
        """Programs compiled (or fetched from the persistent cache)."""
        return int(_totals["count"] - self._start["count"])

    @property
    def seconds(self) -> float:
        """Time spent on it."""
        return _totals["seconds"] - self._start["seconds"]


def use_persistent_cache(folder: str | Path) -> None:
    """Keeps compiled programs for this process and the next. Changes jax's configuration: for commands.

    Args:
        folder: where; a string with `://` in it is a place in a bucket.
    """
    if "://" not in str(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
