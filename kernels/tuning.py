"""Block sizes by device: the library's tables, and before them what `bicache doctor --full --save-tuning` measured.

A user's table is a JSON file per kind of device in `bicache-jax/tuning` of the user's cache folder, or in the folder
that `BICACHE_TUNING` names (`off`: none). It has rows as the library's table of that platform has, and is read once.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bicache_jax.core.cache_home import cache_home
from bicache_jax.core.device import file_name

TABLES = {"cuda": "gpu_forms.json", "tpu": "tpu_blocks.json"}
"""The library's table of each platform, as jax names the platform of a program."""
ENVIRONMENT = "BICACHE_TUNING"
_REQUIRED = {
    "cuda": {"dtypes", "max_queries", "max_head_dim", "form"},
    "tpu": {"max_queries", "itemsize", "queries", "keys", "chunks"},
}

Row = Mapping[str, Any]


def platform_here() -> str:
    """The platform of programs for this process's devices, as jax names it when it lowers them."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def device_kind(platform: str) -> str | None:
    """Kind of device that a program of a platform is traced for; None if it is not attached (a remote topology)."""
    return jax.devices()[0].device_kind if platform_here() == platform else None


def tuning_file(kind: str) -> Path | None:
    """Where a user's table for a kind of device lies, there or not; None where there is no folder for it."""
    named = os.environ.get(ENVIRONMENT)
    if named and named.lower() in ("off", "0", "false", "no"):
        return None
    home = cache_home()
    folder = Path(named).expanduser() if named else home / "bicache-jax" / "tuning" if home is not None else None
    return None if folder is None else folder / f"{file_name(kind)}.json"


@functools.cache
def library_rows(platform: str) -> tuple[Row, ...]:
    """Rows of the library's table, the first that fits counts."""
    table = json.loads((importlib.resources.files("bicache_jax.kernels") / TABLES[platform]).read_bytes())
    return tuple(table["rows"])


@functools.cache
def _user_rows(path: Path, platform: str) -> tuple[Row, ...]:
    """Rows that a user's device measured; a file that cannot be read is reported once and not used."""
    try:
        table = json.loads(path.read_bytes())
        rows = tuple(table["rows"])
        if table["platform"] != platform or not all(_REQUIRED[platform] <= set(row) for row in rows):
            raise ValueError(f"its rows are not those of {TABLES[platform]}")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is not used: {error}; 'bicache doctor --full --save-tuning' makes it", stacklevel=2)
        return ()
    return rows


def rows(platform: str, kind: str | None) -> tuple[Row, ...]:
    """All rows for a kind of device, the user's before the library's.

    Args:
        platform: `cuda` or `tpu`.
        kind: as jax names it; None: a device that is not known.
    """
    path = None if kind is None else tuning_file(kind)
    own = () if path is None else _user_rows(path, platform)
    return (*own, *(row for row in library_rows(platform) if row.get("device_kind", "any") in (kind, "any")))


def save_rows(platform: str, kind: str, measured: Sequence[Row], facts: Row) -> Path:
    """Writes a user's table; this process keeps using what it has read before.

    Args:
        platform: `cuda` or `tpu`.
        kind: of device, as jax names it.
        measured: rows as in the library's table.
        facts: versions and other facts, kept with them.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    path = tuning_file(kind)
    if path is None:
        raise OSError(f"there is no folder for it: set {ENVIRONMENT} to one")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    table = {"platform": platform, "device_kind": kind, **facts, "rows": list(measured)}
    part.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path
