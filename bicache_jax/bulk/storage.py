"""Files here and in buckets: local names are `pathlib` paths, `gs://` and `s3://` ones `etils.epath` paths."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import gzip
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bicache_jax.bulk.journal import write_atomic
from bicache_jax.core.types import BicacheError
from bicache_jax.serving.inputs import gzip_faults, is_gzip

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


def _file_system(path: AnyPath) -> tuple[Any, str]:
    """The file system of a bucket and the name of an object in it, in which no character is a wildcard."""
    import fsspec

    scheme = str(path).partition("://")[0]
    files = fsspec.filesystem(scheme, **({"finalize_on_close": True} if scheme == "gs" else {}))
    return files, str(files._strip_protocol(str(path)))


def exists(path: AnyPath) -> bool:
    """Whether there is such a file.

    Raises:
        Exception: a bucket does not answer, for which `exists` of the libraries would say no.
    """
    if not is_remote(path):
        return bool(path.exists())
    files, name = _file_system(path)
    try:
        files.info(name)
    except FileNotFoundError:
        return False
    return True


def listed(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """What is in a folder, sorted by name; nothing where there is no such folder.

    Args:
        folder: its name is taken as it is.
        pattern: of names, with wildcards.

    Raises:
        Exception: it cannot be listed, for which `glob` of the libraries may say that it is empty.
    """
    try:
        if is_remote(folder):
            files, name = _file_system(folder)
            entries = {str(entry).rstrip("/") for entry in files.ls(name, detail=False)} - {name.rstrip("/")}
            names = [entry.rpartition("/")[2] for entry in entries]
        else:
            names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


def read_bytes(path: AnyPath) -> bytes:
    """What is in a file."""
    with opened(path) as file:
        return bytes(file.read())


def opened(path: AnyPath) -> contextlib.AbstractContextManager[Any]:
    """A file, to be read."""
    if not is_remote(path):
        file: contextlib.AbstractContextManager[Any] = path.open("rb")
    else:
        files, name = _file_system(path)
        file = files.open(name, "rb")
    return file


class Lines:
    """The lines of an input file, decompressed where it is gzip.

    Attributes:
        bytes: how much of the file, as it is stored, has been read.
    """

    def __init__(self, path: AnyPath) -> None:
        self._path = path
        self.bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        with faults(f"cannot read --input {self._path}"), opened(self._path) as stream:
            compressed = is_gzip(str(self._path), stream.read(2))
            stream.seek(0)
            if not compressed:
                for line in stream:
                    self.bytes += len(line)
                    yield line
                return
            with gzip_faults(f"--input {self._path}"):
                for line in gzip.GzipFile(fileobj=stream):
                    self.bytes = stream.tell()
                    yield line
            self.bytes = stream.tell()


def remove(path: AnyPath) -> None:
    """Deletes a file, if it is there."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    files, name = _file_system(path)
    with contextlib.suppress(FileNotFoundError):
        files.rm_file(name)


def remove_folder(folder: AnyPath) -> None:
    """Deletes a folder, which another worker may be deleting, too, as far as that goes."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(Exception), ThreadPoolExecutor(16) as pool:
        files, name = _file_system(folder)
        for _ in pool.map(files.rm_file, files.find(name)):  # `rm` would read wildcards in names
            pass


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
            path = path_of(pattern)
            if not is_remote(pattern):
                matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
            else:
                matches = _matching(path) if _is_pattern(pattern) else []
            matches = matches or [path] * exists(path)
            if not matches:
                raise BicacheError(f"--input {pattern}: no such file")
            for path in matches:
                if _is_folder(path):
                    raise BicacheError(f"--input {path} is a folder: name its files, as in '{path}/*.jsonl'")
                found[str(path)] = path
    names: dict[str, AnyPath] = {}
    for path in found.values():
        other = names.setdefault(path.name.removesuffix(".gz"), path)
        if other is not path:
            raise BicacheError(f"--input names both {other} and {path}: results are named after files, rename one")
    return list(found.values())


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def _matching(path: AnyPath) -> list[AnyPath]:
    """What matches a pattern, level by level; a path without wildcards is taken as it is."""
    if not _is_pattern(str(path)):
        return [path]
    if path.name == "**" or _is_pattern(str(path).split("/")[2]):
        raise BicacheError(f"--input {path}: on buckets ** does not work, nor do wildcards in the name of the bucket")
    return [found for folder in _matching(path.parent) for found in listed(folder, path.name)]


def _is_folder(path: AnyPath) -> bool:
    if not is_remote(path):
        return bool(path.is_dir())
    files, name = _file_system(path)
    return files.info(name)["type"] == "directory"


def size_of(path: AnyPath) -> int:
    """Bytes of an input file.

    Raises:
        BicacheError: it cannot be read.
    """
    with faults(f"cannot read --input {path}"):
        if not is_remote(path):
            return int(path.stat().st_size)
        files, name = _file_system(path)
        return int(files.info(name)["size"])


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
    with faults(f"cannot write {path}"), tempfile.NamedTemporaryFile() as file:
        file.writelines(lines)
        file.flush()
        upload(Path(file.name), path)


def upload(source: Path, target: AnyPath) -> None:
    """Writes an object that appears when all of it is there; one that is opened appears torn where a part fails."""
    files, name = _file_system(target)
    files.put_file(str(source), name)
