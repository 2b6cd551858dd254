"""An input file in windows of requests: what is in memory at a time, and within which prefixes are found."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from bicache_jax.bulk.manifest import InputDigest
from bicache_jax.bulk.storage import AnyPath, Lines
from bicache_jax.core.types import Request, Result
from bicache_jax.serving.inputs import Requests

T = TypeVar("T")
Parse = Callable[[Iterable[bytes], str], Iterable[Request | Result]]


@dataclasses.dataclass(frozen=True)
class Window:
    """Requests of a file that are planned together.

    Attributes:
        number: place among the windows of the file.
        requests: what they are; their digest is that of the window's lines.
        first: place of the first request in the file.
        end: bytes of the file up to its end.
        digest: `InputDigest` of the file's lines up to its end.
    """

    number: int
    requests: Requests
    first: int
    end: int
    digest: str


class _Lines:
    """Lines of a file, hashed and counted as they pass."""

    def __init__(self, path: AnyPath) -> None:
        self._lines = Lines(path)
        self._digest, self._whole = hashlib.sha256(), InputDigest()

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            self._digest.update(line)
            self._whole.add(line)
            yield line

    @property
    def bytes(self) -> int:
        """How much of the file has been read."""
        return self._lines.bytes

    @property
    def whole(self) -> str:
        """The digest of all lines so far."""
        return str(self._whole)

    def digest(self) -> str:
        """The hash of the lines since the last call."""
        found = self._digest.hexdigest()
        self._digest = hashlib.sha256()
        return found


def windows(path: AnyPath, parse: Parse, size: int) -> Iterator[Window]:
    """Reads a file window by window; nothing of a window is kept but the ids of its requests.

    Args:
        path: the file.
        parse: turns lines into requests or error results, one by one.
        size: requests in a window.

    Raises:
        BicacheError: the file cannot be read.
    """
    lines = _Lines(path)
    items = iter(parse(lines, str(path)))
    number = first = 0
    while batch := list(islice(items, size)):
        yield Window(number, Requests(str(path), [], lines.digest(), batch), first, lines.bytes, lines.whole)
        number, first = number + 1, first + len(batch)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next one being made by a thread while one is in use."""
    source = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item  # type: ignore[misc]
