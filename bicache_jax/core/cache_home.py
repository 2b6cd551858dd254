"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path | None:
    """`$XDG_CACHE_HOME`, or `.cache` in the user's home; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
