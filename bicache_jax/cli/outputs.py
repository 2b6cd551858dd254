"""The output: a file that is whole or not there, with a journal beside it; or a stream, in order."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from bicache_jax.bulk.journal import Journal, dump, journal_path, write_atomic
from bicache_jax.bulk.manifest import Entry, check_finished, read_manifest, write_manifest
from bicache_jax.bulk.storage import faults, remove
from bicache_jax.core.types import BicacheError, Key, Record, native
from bicache_jax.serving.inputs import STANDARD, Requests
from bicache_jax.serving.results import ResultFormat

STANDARD_OUTPUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
"""Other names of standard output: where it is redirected to a file, that file must not be replaced by a rename."""


class Output:
    """Takes finished results as they come; keeps them in memory only.

    Attributes:
        finished: results by (id, sample).
        format: how results are written.
        complete: what an earlier run has said of the output that it finished; None where there is something to do.
    """

    def __init__(self) -> None:
        self.finished: dict[Key, Record] = {}
        self.format = ResultFormat()
        self.complete: Entry | None = None

    def begin(self, requests: Requests, run: Mapping[str, Any]) -> None:
        """Called once, when it is known what is to be run.

        Args:
            requests: the parsed input.
            run: everything that determines results.
        """
        self._requests = requests

    def add(self, record: Record) -> None:
        """Takes a finished result."""
        self.finished[record["id"], record["sample"]] = record

    def finish(self) -> list[Record]:
        """Completes the output; returns all results in input order."""
        return list(self._requests.assemble(self.finished))

    def close(self) -> None:
        """Lets go of the output, complete or not."""

    def last_words(self) -> str:
        """What an interrupted user should know; called when the process is about to end, maybe from another thread."""
        return ""


class StreamOutput(Output):
    """Writes each result to a stream as soon as all before it are there."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        super().__init__()
        self._stream, self._name = stream, name

    def begin(self, requests: Requests, run: Mapping[str, Any]) -> None:
        """Writes the errors that come before the first result."""
        super().begin(requests, run)
        self._due = self.format.lines(requests.follow(self.finished))
        self._write()

    def add(self, record: Record) -> None:
        """Takes a finished result and writes what is due."""
        super().add(record)
        self._write()

    def close(self) -> None:
        """Closes the stream, unless it is standard output."""
        if self._stream is not sys.stdout.buffer:
            self._stream.close()

    def _write(self) -> None:
        for record in self._due:
            if record is None:
                break
            _write(self._stream, dump(record), self._name)
        _write(self._stream, b"", self._name)


class FileOutput(Output):
    """Writes a file by one rename at the end, and until then a journal."""

    def __init__(self, path: str, *, resume: bool, overwrite: bool = False) -> None:
        """Opens the journal, so that a fault shows before anything is computed."""
        super().__init__()
        self.path = path
        self._manifest = Path(f"{path}.manifest.json")
        self._resume, self._written = resume, False
        if os.path.isdir(path):
            raise BicacheError(f"--output {path} is a folder: name a file in it")
        if not os.path.isdir(Path(path).parent):
            raise BicacheError(f"--output {path}: there is no folder {Path(path).parent}: create it first")
        self._journal = Journal(journal_path(path), resume=resume, overwrite=overwrite)

    def begin(self, requests: Requests, run: Mapping[str, Any]) -> None:
        """Takes in what an earlier run has finished, which may be everything.

        Raises:
            BicacheError: that was another run.
        """
        super().begin(requests, run)
        self._entry = Entry(run, requests.digest, len(requests.items))
        # A kill may leave a journal of this run without a result in it, beside an older output or its own.
        begun = self._journal.finished or self._journal.is_of(run)
        if self._resume and not begun and os.path.exists(self.path):
            found = read_manifest(self._manifest).get(Path(self.path).name)
            self.complete = check_finished(self._manifest, Path(self.path), found, run, requests.digest)
            self._written = True
            return
        self._journal.begin(run)
        self.finished.update(self._journal.finished)

    def add(self, record: Record) -> None:
        """Takes a finished result."""
        super().add(record)
        if record["finish_reason"] != "error":  # an error may have gone by the next attempt
            self._journal.add(record)

    def finish(self) -> list[Record]:
        """Writes the file, says what it was made from, then deletes the journal, from which a killed run continues."""
        records = super().finish()
        with faults(f"cannot write {self._manifest}"):
            remove(self._manifest)  # whatever it says is of the file that is replaced now
        write_atomic(self.path, (dump(line) for line in self.format.lines(records) if line is not None))
        write_manifest(self._manifest, {Path(self.path).name: self._entry.with_output(Path(self.path))})
        self._journal.remove()
        self._written = True
        return records

    def close(self) -> None:
        """Closes the journal, which stays if there is something in it."""
        self._journal.close()

    def last_words(self) -> str:
        """How to continue; a journal without results is deleted."""
        if self._written:
            return f"{self.path} is complete"
        if not self._journal.finished:
            self._journal.path.unlink(missing_ok=True)
            return "no result was finished"
        return (
            f"{len(self._journal.finished)} finished results are in {self._journal.path}: the same command with"
            " --resume continues"
        )


def open_output(name: str, source: str, *, resume: bool, stream: bool, overwrite: bool = False) -> Output:
    """Opens the output.

    Args:
        name: `--output`.
        source: `--input`, which must not be overwritten.
        resume: `--resume`.
        stream: `--stream`: standard output is taken by events.
        overwrite: `--overwrite`.

    Raises:
        BicacheError: the output cannot be written there.
    """
    if name in STANDARD_OUTPUT:
        name = STANDARD
    special = os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name)
    if name == STANDARD or special:
        if resume:
            raise BicacheError(f"--resume reads the journal beside an output file, and --output {name} has none")
        if name == STANDARD:
            return Output() if stream else StreamOutput(sys.stdout.buffer, "standard output")
        try:
            # A device or a pipe: not to be replaced by a rename.
            return StreamOutput(open(name, "wb"), f"--output {name}")
        except OSError as error:
            raise BicacheError(f"cannot write --output {name}: {error.strerror}") from error
    if os.path.exists(name) and os.path.exists(source) and os.path.samefile(name, source):
        raise BicacheError(f"--output {name} is the --input: results would replace the requests")
    return FileOutput(name, resume=resume, overwrite=overwrite)


def write_event(record: Record) -> None:
    """Writes a result, finished or not, to standard output at once."""
    _write(sys.stdout.buffer, dump(native(record)), "standard output")


def _write(stream: BinaryIO, data: bytes, name: str) -> None:
    """Writes and flushes.

    Raises:
        BicacheError: that fails, for example on a full device. A reader that went away is not a fault.
    """
    try:
        stream.write(data)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon(stream)
        raise BicacheError(f"cannot write {name}: {error.strerror}") from error


def abandon(stream: BinaryIO) -> None:
    """Lets what is buffered go nowhere: flushing it at exit must not complain once more."""
    with suppress(OSError):  # a stream in memory has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
