"""Finished results on disk while a run goes on, so that a crash, a kill or a preemption costs no computed work.

`OUTPUT.journal` is JSON lines: a header that says which run it belongs to, then one line per finished result in the
order in which they came. The output itself appears at the end, whole, by one rename.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bicache_jax.core.types import BicacheError, Key, Record

try:
    import fcntl
except ImportError:  # Windows: two runs on one journal go unnoticed
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
_HEADER_START = b'{"format": '
# A killed process loses nothing that was written; only a machine that dies loses what was not synced.
SYNC_SECONDS = 1.0


def journal_path(output: str | Path) -> Path:
    """The journal of an output file: its name plus `.journal`."""
    return Path(f"{output}.journal")


# What many readers, such as Python's `splitlines`, take for the end of a line; JSON may write them as escapes.
_SEPARATORS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"})


def dump(record: Mapping[str, Any]) -> bytes:
    """A JSON line, readable where UTF-8 and the readers of lines allow it."""
    try:
        return json.dumps(record, ensure_ascii=False).translate(_SEPARATORS).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in an id
        return json.dumps(record).encode() + b"\n"


class Journal:
    """The journal of one run: opened early, since a fault should not cost a model load; begun when the run is known.

    Attributes:
        path: where it is.
        finished: results by (id, sample), those of earlier runs included.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """Opens and locks a journal, and reads what an earlier run left in it.

        Args:
            path: where it is to be, beside the output.
            resume: whether to continue an existing journal; without one, a new one begins.
            overwrite: whether to drop what is there.

        Raises:
            BicacheError: it cannot be written, another process is writing it, or it holds results and `resume` is not
                set.
        """
        self.path = Path(path)
        self.finished: dict[Key, Record] = {}
        self._found: Record = {}
        try:
            self._file: IO[bytes] = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise BicacheError(f"cannot write {self.path}: {error.strerror}") from error
        try:
            self._lock()
            if overwrite:
                with self._faults():
                    self._file.truncate(0)
            good = self._read()
            if self.finished and not resume:
                raise BicacheError(
                    f"{self.path} holds {len(self.finished)} finished results of an earlier run: continue it with"
                    " --resume, or start over with --overwrite"
                )
            with self._faults():
                self._file.truncate(good)  # the next record must not run into a torn last line
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def begin(self, run: Mapping[str, Any]) -> None:
        """Checks that the results in the journal are this run's, or writes the header of a new one.

        Args:
            run: everything that determines results, by name; JSON values only.

        Raises:
            BicacheError: the journal belongs to a run with another `run`, or to another release's format.
        """
        header = header_of(run)
        if self.finished:
            try:
                check_same_run(self.path, self._found, header)
            except BicacheError:
                self._file.close()
                raise
        else:  # nothing to lose: no journal, or one that was killed before its first result
            with self._faults():
                self._file.truncate(0)
            self._write(dump(header))
            self._sync()

    def is_of(self, run: Mapping[str, Any]) -> bool:
        """Whether this run has begun the journal that was found, with or without results."""
        return self._found == header_of(run)

    def add(self, record: Record) -> None:
        """Writes a finished result.

        Args:
            record: the result as a JSON object with `id` and `sample`.
        """
        self._write(dump(record))
        self.finished[record["id"], record["sample"]] = record
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Syncs and closes the file, which stays if a result is in it."""
        if self._file.closed:
            return
        try:
            with self._faults():
                if not self.finished:
                    self.path.unlink(missing_ok=True)
            self._sync()
        finally:
            self._file.close()

    def remove(self) -> None:
        """Deletes the file: the output holds everything now."""
        self.close()
        with self._faults():
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BicacheError(f"{self.path} is in use: another run is writing the same --output") from None
        except OSError:
            pass  # a file system without locks

    def _read(self) -> int:
        """Takes in what is there; returns how many of the file's bytes are whole lines."""
        self._file.seek(0)
        # `readline` ends a line at b"\n" alone: a result's text may hold every other line separator unescaped.
        reader = io.BufferedReader(io.FileIO(self._file.fileno(), closefd=False))
        self._found, records, good = read_journal(reader, self.path)
        self.finished = {(record["id"], record["sample"]): record for record in records}
        return good

    def _write(self, line: bytes) -> None:
        view = memoryview(line)
        with self._faults():
            while view:
                view = view[self._file.write(view) :]

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Reports a full disk and similar faults in one line; what was written can be resumed."""
        try:
            yield
        except OSError as error:
            raise BicacheError(f"cannot write {self.path}: {error.strerror}") from error

    def _sync(self) -> None:
        with self._faults():  # where a network file system says that it is full
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def write_atomic(path: str | Path, lines: Iterable[bytes], temporary: Path | None = None) -> None:
    """Writes a file that is either whole or not there: a temporary file, synced, then one rename.

    Args:
        path: the file; what is there is replaced, through a symbolic link if it is one.
        lines: its content.
        temporary: the temporary file, on the same file system, which no other process writes; by default it is
            beside `path`, of one name, so that what a killed process left is replaced.

    Raises:
        BicacheError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary or target.with_name(f".{target.name}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # the rename is an entry of the folder, which has to reach the disk as well
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise BicacheError(f"cannot write {path}: {error.strerror}") from error


def read_journal(stream: io.BufferedIOBase, path: object) -> tuple[Record, list[Record], int]:
    """Reads a journal, whole or torn.

    Args:
        stream: its bytes.
        path: its name in messages.

    Returns:
        Its header (empty where that was torn), its records, and how many bytes are whole lines.

    Raises:
        BicacheError: it is no journal.
    """
    first = stream.readline()
    header = _parse_header(first)
    if header is None:
        raise BicacheError(f"{path} is not a journal of bicache: move it away, or choose another --output")
    records = []
    good = len(first)
    for line in iter(stream.readline, b""):
        if not line.endswith(b"\n"):
            break
        good += len(line)
        record = _parse_record(line)
        if record is not None:  # else: a line that was damaged in a crash; its result is computed again
            records.append(record)
    return header, records, good


def _parse_header(line: bytes) -> Record | None:
    """The header in a journal's first line, empty where it was torn; None where it is not a header."""
    if not line.endswith(b"\n"):
        return {} if _HEADER_START.startswith(line[: len(_HEADER_START)]) else None
    try:
        found = json.loads(line)
        return {"format": int(found["format"]), "run": dict(found["run"])}
    except (ValueError, KeyError, TypeError):
        return None


def _parse_record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        return record if isinstance(record["id"], str) and isinstance(record["sample"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def header_of(run: Mapping[str, Any]) -> Record:
    """The header of a run's journal; `run` is everything that determines results, JSON values only."""
    return {"format": FORMAT, "run": json.loads(json.dumps(run))}


OVERWRITE = "--overwrite starts over"
_REPEAT = f"repeat the first command with --resume, or {OVERWRITE}"


def check_same_run(path: object, found: Record, header: Record, *, hint: str = _REPEAT) -> None:
    """Compares the header of a journal with that of the run that wants to continue it.

    Args:
        path: what holds the header, for messages.
        found: the header that is there.
        header: that of this run.
        hint: what to do where they differ.

    Raises:
        BicacheError: they differ; the message names the first thing in which they do.
    """
    if found["format"] != header["format"]:
        raise BicacheError(
            f"{path} has journal format {found['format']} and this release writes {header['format']}: delete it to"
            " begin again"
        )
    there, here = found["run"], header["run"]
    for name in [*here, *(name for name in there if name not in here)]:
        was, now = there.get(name), here.get(name)
        if was != now:
            raise BicacheError(
                f"{path} belongs to another run: {name} was {_show(was)} and is {_show(now)} now; {hint}"
            )


def _show(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
