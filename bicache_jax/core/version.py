"""Installed releases."""

from __future__ import annotations

from importlib import metadata


def release(distribution: str) -> str | None:
    """The installed release of a distribution; None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def version() -> str:
    """The library's own release, or `unknown` in a checkout that was never installed."""
    return release("bicache-jax") or "unknown"
