"""The input: requests as lines, and the order in which their results go out."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from bicache_jax.core.types import BicacheError, Key, Record, Request, Result

STANDARD = "-"


@runtime_checkable
class Asks(Protocol):
    """What a line asks for: a `Request`, or one to score."""

    @property
    def id(self) -> str:
        """Its name."""
        ...

    @property
    def n(self) -> int:
        """How many results it has."""
        ...


Item = TypeVar("Item", bound=Asks)
_GZIP = b"\x1f\x8b"  # how gzip files begin, and no JSON


@dataclasses.dataclass
class Requests(Generic[Item]):
    """A file of requests.

    Attributes:
        source: its name in messages.
        lines: its lines, as bytes: what is not UTF-8 spoils its own line only.
        digest: hash of its bytes.
        items: per request, in input order: what to run, or the result that says what is wrong with it.
    """

    source: str
    lines: list[bytes]
    digest: str
    items: list[Item | Result] = dataclasses.field(default_factory=list)

    @property
    def valid(self) -> list[Item]:
        """The requests that can run."""
        return [item for item in self.items if not isinstance(item, Result)]

    def notes(self, field: str) -> list[Any]:
        """What the line of each item says in a field that changes no result; None where it says nothing."""
        found: list[Any] = []
        for line in self.lines:
            if is_blank(line):
                continue
            try:
                found.append(json.loads(line)[field])
            except (ValueError, KeyError, TypeError, RecursionError):
                found.append(None)
        return found

    def follow(self, finished: Mapping[Key, Record]) -> Iterator[Record | None]:
        """Yields results in input order, None as long as the next one is not in `finished` yet."""
        for item in self.items:
            if isinstance(item, Result):
                yield item.to_record()
                continue
            sample = 0
            while sample < item.n:
                record = finished.get((item.id, sample))
                yield record
                if record is not None:
                    # A request that turns out not to run has one result, however many samples it asked for.
                    sample = item.n if record["finish_reason"] == "error" else sample + 1

    def assemble(self, finished: Mapping[Key, Record]) -> Iterator[Record]:
        """Yields all results in input order."""
        for record in self.follow(finished):
            if record is None:
                raise RuntimeError("a request ended without a result")
            yield record


def is_gzip(name: str, beginning: bytes) -> bool:
    """Whether a file is compressed: its name ends in `.gz`, or it begins as gzip files do."""
    return name.endswith(".gz") or beginning.startswith(_GZIP)


@contextlib.contextmanager
def gzip_faults(what: str) -> Iterator[None]:
    """Says that a file is not a whole gzip file.

    Raises:
        BicacheError: it is not; the message begins with `what`.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BicacheError(f"{what}: not a whole gzip file ({error})") from None


def is_blank(line: Any) -> bool:
    """Whether a line holds nothing, a byte order mark aside."""
    if isinstance(line, bytes):
        return not line.removeprefix(b"\xef\xbb\xbf").strip()
    return isinstance(line, str) and not line.removeprefix("\ufeff").strip()


def read_requests(name: str, flag: str = "--input") -> Requests:
    """Reads a file of requests.

    Args:
        name: the file; `-` is standard input.
        flag: the flag that named it, for messages.

    Raises:
        BicacheError: it cannot be read.
    """
    source = "standard input" if name == STANDARD else name
    try:
        data = sys.stdin.buffer.read() if name == STANDARD else Path(name).read_bytes()
    except OSError as error:
        raise BicacheError(f"cannot read {flag} {source}: {error.strerror}") from error
    if is_gzip(name, data):
        with gzip_faults(f"{flag} {source}"):
            data = gzip.decompress(data)
    return Requests(source, data.split(b"\n"), hashlib.sha256(data).hexdigest())


def remaining(requests: Sequence[Request], finished: Mapping[Key, Any]) -> list[tuple[Request, int]]:
    """What is left to run.

    Args:
        requests: all requests.
        finished: finished (id, sample).

    Returns:
        Requests, each with the number of its first sample: one gapless stretch of samples per request, so that the
        engine's sample numbers can be told apart. Where there are gaps, call again when that is done.
    """
    todo = []
    for request in requests:
        missing = [sample for sample in range(request.n) if (request.id, sample) not in finished]
        if not missing:
            continue
        first = missing[0]
        n = next((i for i, sample in enumerate(missing) if sample != first + i), len(missing))
        sampling = dataclasses.replace(request.sampling, seed=request.sampling.seed + first)
        todo.append((dataclasses.replace(request, sampling=sampling, n=n), first))
    return todo
