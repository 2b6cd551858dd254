"""Files here and in buckets: local names are `pathlib` paths, `gs://` and `s3://` ones `etils.epath` paths."""

from __future__ import annotations

import contextlib
import glob
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bicache_jax.journal import write_atomic
from bicache_jax.types import BicacheError

AnyPath = Any
"""A `pathlib.Path` or an `etils.epath.Path`; they share their methods."""


def is_remote(path: object) -> bool:
    """Whether a name is that of an object in a bucket."""
    return "://" in str(path)


def path_of(name: str) -> AnyPath:
    """The path of a name.

    Raises:
        BicacheError: it is remote, and the library for that is not installed.
    """
    if not is_remote(name):
        return Path(name)
    try:
        import fsspec
        from etils import epath
    except ImportError:
        raise BicacheError(f"{name}: to use buckets install the extra: pip install 'bicache-jax[buckets]'") from None
    for scheme in ("s3", "gs", "gcs"):  # a listing that is remembered lacks what another worker has written since
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(name)


def reason(error: Exception) -> str:
    """The first line of what a file system says; bucket libraries raise many kinds of exceptions."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]


def exists(path: AnyPath) -> bool:
    """Whether there is such a file.

    Raises:
        Exception: a bucket does not answer, for which `exists` of the libraries would say no.
    """
    if not is_remote(path):
        return bool(path.exists())
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def faults(what: str) -> Iterator[None]:
    """Says in one line what a file system or a bucket objects to.

    Raises:
        BicacheError: `what`, and why not.
    """
    try:
        yield
    except BicacheError:
        raise
    except Exception as error:  # bucket libraries raise many kinds
        raise BicacheError(f"{what}: {reason(error)}") from error


def inputs(patterns: Iterable[str]) -> list[AnyPath]:
    """The input files.

    Args:
        patterns: paths or globs.

    Returns:
        Files, sorted by name within a pattern, each once.

    Raises:
        BicacheError: a pattern matches nothing, or two files have one name, after which their outputs are called.
    """
    found: dict[str, AnyPath] = {}
    for pattern in patterns:
        with faults(f"cannot read --input {pattern}"):
            if is_remote(pattern):
                path = path_of(pattern)
                magic = any(letter in path.name for letter in "*?[")
                matches = sorted(path.parent.glob(path.name), key=str) if magic else [path] * exists(path)
            else:
                matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
                matches = matches or [Path(pattern)] * Path(pattern).exists()
            if not matches:
                raise BicacheError(f"--input {pattern}: no such file")
            for path in matches:
                if path.is_dir():
                    raise BicacheError(f"--input {path} is a folder: name its files, as in '{path}/*.jsonl'")
                found[str(path)] = path
    names: dict[str, AnyPath] = {}
    for path in found.values():
        other = names.setdefault(path.name, path)
        if other is not path:
            raise BicacheError(f"--input names both {other} and {path}: results are named after files, rename one")
    return list(found.values())


def size_of(path: AnyPath) -> int:
    """Bytes of an input file.

    Raises:
        BicacheError: it cannot be read.
    """
    with faults(f"cannot read --input {path}"):
        stat = path.stat()
        return int(stat.length if is_remote(path) else stat.st_size)


def write_whole(path: AnyPath, lines: Iterable[bytes], temporary: AnyPath | None = None) -> None:
    """Writes a file that is either whole or not there.

    Args:
        path: the file.
        lines: its content.
        temporary: where a local file is put together, which matters where several processes may write it at once.

    Raises:
        BicacheError: it cannot be written.
    """
    if not is_remote(path):
        write_atomic(path, lines, temporary)
        return
    # An object appears when its upload is complete; it is put together here first, since an error on the way would
    # complete it too.
    with tempfile.TemporaryFile() as file:
        file.writelines(lines)
        file.seek(0)
        with faults(f"cannot write {path}"), path.open("wb") as remote:
            shutil.copyfileobj(file, remote, 1 << 20)
