"""`--preset`: flags as the authors of a model publish them, kept as data in `configs/presets/`.

A file there is `{"summary", "source", "flags"}`; flags have the names of the command line, with underscores.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
from typing import Any


def presets() -> dict[str, dict[str, Any]]:
    """All presets by name. They are read as files: a command's help must not wait for numpy."""
    folder = importlib.resources.files("bicache_jax") / "configs" / "presets"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return {file.name.removesuffix(".json"): json.loads(file.read_text(encoding="utf-8")) for file in files}


def preset_flags(name: str) -> dict[str, Any]:
    """The argument type of `--preset`: the flags that it stands for.

    Raises:
        ArgumentTypeError: there is no such preset.
    """
    known = presets()
    if name not in known:
        raise argparse.ArgumentTypeError(f"no preset {name!r}; there are {', '.join(known)}")
    flags: dict[str, Any] = known[name]["flags"]
    return flags


def preset_summary() -> str:
    """What each preset is for, a line each."""
    known = presets()
    width = max(map(len, known))
    return "\n".join(f"  {name:<{width}}  {entry['summary']}" for name, entry in known.items())
