"""`--preset`: flags as the authors of a model publish them, kept as data in `configs/presets/`.

A file there is `{"summary", "source", "flags"}`; flags have the names of the command line, with underscores.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
from typing import Any

from bicache_jax.cli.options import FlagGroup, Parser


def presets() -> dict[str, dict[str, Any]]:
    """All presets by name. They are read as files: a command's help must not wait for numpy."""
    folder = importlib.resources.files("bicache_jax") / "configs" / "presets"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return {file.name.removesuffix(".json"): json.loads(file.read_text(encoding="utf-8")) for file in files}


EXCLUSIVE = (("threshold", "factor", "entropy_bound"), ("steps", "steps_per_block"))
"""Flags of which the command line takes one: that one given rules out a preset's others."""


def add_preset_flag(parser: Parser, group: FlagGroup) -> None:
    """Adds `--preset`.

    Args:
        parser: the parser of the flags that presets set.
        group: where the help lists it.
    """
    group.add_argument(
        "--preset",
        type=preset_flags,
        metavar="NAME",
        help="flags as a model's authors publish them (names below); any flag given with it overrides (default: none)",
    )
    of_presets = {name for preset in presets().values() for name in preset["flags"]}
    parser.presettable = sorted(of_presets.union(*EXCLUSIVE))
    parser.exclusive = EXCLUSIVE


def preset_flags(name: str) -> dict[str, Any]:
    """The argument type of `--preset`: the flags that it sets.

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
