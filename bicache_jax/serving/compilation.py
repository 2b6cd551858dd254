"""Counting compilations, so that "nothing recompiles" is a measurement; and XLA's persistent compilation cache."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental.compilation_cache import compilation_cache

from bicache_jax.core.cache_home import cache_home

ENVIRONMENT = "BICACHE_COMPILATION_CACHE"
"""Environment variable: the folder of compiled programs where no call and no flag names one, or `off`."""

_COMPILED = "/jax/core/compile/backend_compile_duration"
_EVENTS = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration", _COMPILED)
_totals = {"count": 0, "seconds": 0.0}


class _Spans(threading.local):
    """The last events of a thread: when each began, and how long it took."""

    def __init__(self) -> None:
        self.last: deque[tuple[float, float]] = deque(maxlen=256)


_spans = _Spans()


@functools.cache
def _listen() -> None:
    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event not in _EVENTS:
            return
        _totals["count"] += event == _COMPILED
        begin, last = time.monotonic() - duration_secs, _spans.last
        while last and last[-1][0] + last[-1][1] / 2 > begin:  # it was a part of this one
            _totals["seconds"] -= last.pop()[1]
        last.append((begin, duration_secs))
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
        """Time spent on it: tracing, lowering and compiling (or fetching)."""
        return _totals["seconds"] - self._start["seconds"]


# The setting belongs to jax, which has one for the whole process; here is only whether it was made, and by whom.
_state: dict[str, Any] = {"chosen": False, "ours": None}


def use_compilation_cache(folder: str | Path | Literal[False] | None = None) -> str | None:
    """Keeps compiled programs on disk for this process and the next, or stops that.

    The first `Engine` of a process does this with None, unless it was called before; importing the library never does.
    It changes jax's configuration, and so holds for all of the process.

    Args:
        folder: where; a string with `://` in it is a place in a bucket. None: the folder that the environment variable
            `BICACHE_COMPILATION_CACHE` names (`off`: none), else `bicache-jax/xla` in the user's cache folder; a cache
            that jax was given otherwise (`JAX_COMPILATION_CACHE_DIR`, `jax.config`) stays. False: none, apart from one
            that jax was given otherwise.

    Returns:
        The folder that jax now uses; None if there is none.

    Raises:
        OSError: a folder that was named cannot be written. A default folder that cannot be is left out.
    """
    if not (folder is None or folder is False or isinstance(folder, str | os.PathLike)):
        raise TypeError(f"folder must be a path, None for the default, or False for none, got {folder!r}")
    _state["chosen"] = True
    if folder is None and (named := os.environ.get(ENVIRONMENT)):
        folder = False if named.lower() in ("off", "0", "false", "no") else named
    current = _folder()
    if folder is False:
        if current is not None and current == _state["ours"]:
            _set(None)
    elif folder is not None:
        _keep(folder)
    elif current is None and (home := cache_home()) is not None:
        try:
            _keep(home / "bicache-jax" / "xla")
        except OSError:
            return None
    return _folder()


def start_compilation_cache() -> None:
    """The default of `use_compilation_cache`, if nobody has chosen."""
    if not _state["chosen"]:
        use_compilation_cache()


@contextlib.contextmanager
def kept_in(folder: str) -> Iterator[None]:
    """Inside it, compiled programs are kept in this folder, whatever was chosen for the process."""
    before = _folder()
    limits = ("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    kept = {name: getattr(jax.config, name) for name in limits}
    try:
        for name in limits:
            jax.config.update(name, 0)
        _open(folder)
        yield
    finally:
        for name, value in kept.items():
            jax.config.update(name, value)
        _open(before)


def _folder() -> str | None:
    found: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return found


def _keep(folder: str | Path) -> None:
    if "://" not in str(folder):
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    _set(str(folder))
    # jax keeps what took a second to compile; of our programs the next process needs the small ones too.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES" not in os.environ:
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _set(folder: str | None) -> None:
    _open(folder)
    _state["ours"] = folder


def _open(folder: str | None) -> None:
    if _folder() not in (None, folder):
        compilation_cache.reset_cache()  # one that jax has opened stays open whatever the configuration says
    jax.config.update("jax_compilation_cache_dir", folder)
