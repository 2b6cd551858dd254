"""The installed release."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """The installed release, or `unknown` in a checkout that was never installed."""
    try:
        return metadata.version("bicache-jax")
    except metadata.PackageNotFoundError:
        return "unknown"
