"""What a job has finished, on disk or in a bucket, so that it can be killed and resumed anywhere.

    OUTPUT/requests.jsonl                                   results of requests.jsonl in input order, once complete
    OUTPUT/_state/run.json                                  what determines results; a restart must agree
    OUTPUT/_state/requests.jsonl/000003.00001-of-00002.journal    window 3's results of worker 1 of 2, as they came
    OUTPUT/_state/00001-of-00002.done                       worker 1 has finished
    OUTPUT/_state/inputs.json                               what outputs are put together from, just before they are
    OUTPUT/_manifest.json                                   what finished outputs were made from

Workers share nothing else. Whoever finds that all have finished puts the outputs together and removes the state; should
two find it at once, they write the same bytes. A slice (`--shard 1/4`) has `-00001-of-00004` behind every name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bicache_jax.bulk.journal import Journal, check_same_run, dump, header_of
from bicache_jax.bulk.manifest import Entry, check_finished, digest_of, read_manifest, write_manifest
from bicache_jax.bulk.storage import (
    AnyPath,
    Lines,
    exists,
    faults,
    is_remote,
    listed,
    path_of,
    read_bytes,
    remove,
    remove_folder,
    write_whole,
)
from bicache_jax.bulk.window_journal import WindowJournal, in_order, read_window
from bicache_jax.core.types import BicacheError, Record
from bicache_jax.serving.results import ResultFormat

_ERROR: Record = {"finish_reason": "error"}
_OWN = re.compile(r"(?:\d{6}\.)?(\d{5})-of-(\d{5})\.(?:journal|done)")


@dataclasses.dataclass(frozen=True)
class Worker:
    """One of the processes that divide an input.

    Attributes:
        number: which one.
        count: how many there are.
        shard: which independent slice of the input they all work on, and how many there are.
    """

    number: int = 0
    count: int = 1
    shard: tuple[int, int] = (0, 1)

    @property
    def name(self) -> str:
        """The worker among those that share a state."""
        return f"{self.number:05d}-of-{self.count:05d}"

    @property
    def suffix(self) -> str:
        """What names of outputs end in."""
        part, parts = self.shard
        return f"-{part:05d}-of-{parts:05d}" if parts > 1 else ""


class State:
    """The state of a job, as one worker sees it."""

    def __init__(
        self,
        output: str,
        files: Sequence[AnyPath],
        worker: Worker,
        *,
        resume: bool,
        overwrite: bool = False,
        format: ResultFormat | None = None,
    ) -> None:
        """Looks at what there is.

        Args:
            output: the folder of the results.
            files: the input files.
            worker: which worker this is.
            resume: whether to continue what an earlier run left.
            overwrite: whether to delete that, and outputs of these inputs.
            format: how results are written; None: in our own format.

        Raises:
            BicacheError: the folder cannot be written, or holds results of an earlier run and `resume` is not set.
        """
        self.worker = worker
        self.output = path_of(output)
        self._folder = self.output / f"_state{worker.suffix}"
        self._files = {path.name: path for path in files}
        self._manifest = self.output / f"_manifest{worker.suffix}.json"
        self._noted = self._folder / "inputs.json"  # what the manifest will say, from before there is an output
        self.format = format or ResultFormat()
        self._run: Mapping[str, Any] = {}
        with self._faults():
            if overwrite:
                self._delete_earlier()
            if not is_remote(output):
                self._folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                self._refuse_earlier()
            remove(self._done(worker.number))  # a run that was killed while it put outputs together
            self._spool = tempfile.TemporaryDirectory(prefix="bicache-") if is_remote(output) else None

    def _faults(self) -> contextlib.AbstractContextManager[None]:
        return faults(f"cannot write --output {self.output}")

    def _refuse_earlier(self) -> None:
        """Other workers of this very job may have begun already; what is refused is what they cannot have written."""
        hint = "continue with --resume, start over with --overwrite, or choose another --output"
        for name in self._files:
            if exists(self.final(name)):
                raise BicacheError(f"{self.final(name)} exists already: {hint}")
        folders = (self._folder, *(self._folder / name for name in self._files))
        for path in (path for folder in folders for path in listed(folder, "*-of-*")):
            found = _OWN.fullmatch(path.name)
            if found and (int(found[2]) != self.worker.count or int(found[1]) == self.worker.number):
                raise BicacheError(f"{self._folder} holds results of an earlier run: {hint}")

    def _delete_earlier(self) -> None:
        entries = read_manifest(self._manifest)
        for name in self._files:
            entries.pop(self.final(name).name, None)
        remove(self._manifest)  # first: it must never speak of what is no longer there
        if entries:
            write_manifest(self._manifest, entries)
        for name in self._files:
            remove(self.final(name))
        remove_folder(self._folder)

    def begin(self, run: Mapping[str, Any]) -> list[Entry]:
        """Checks that what is there belongs to this run, or says what run this is.

        Args:
            run: everything that determines results except the input, by name; JSON values only.

        Returns:
            What earlier runs say of the outputs that are finished.

        Raises:
            BicacheError: it is another run's, or an input or an output was changed since.
        """
        self._run = run
        finished = [self._check_finished(name) for name in self._files if self.is_complete(name)]
        with self.unless_over(), self._faults():
            self._begin(self._folder / "run.json", header_of({**run, "input": list(self._files)}))
        return finished

    def _check_finished(self, name: str) -> Entry:
        final = self.final(name)
        noted = read_manifest(self._noted)  # first: it is removed when the manifest is written
        said = {**read_manifest(self._manifest), **noted}
        with self._faults():
            digest = digest_of(Lines(self._files[name]))
        return check_finished(self._manifest, final, said.get(final.name), self._run, digest)

    def _begin(self, path: AnyPath, header: Record) -> None:
        if exists(path):
            try:
                found = json.loads(read_bytes(path))
                found = {"format": int(found["format"]), "run": dict(found["run"])}
            except (ValueError, KeyError, TypeError):
                raise BicacheError(f"{path} is damaged: delete {self._folder} to start over") from None
            check_same_run(path, found, header)
        else:
            write_whole(path, [dump(header)], self._temporary("run.json"))

    def final(self, name: str) -> AnyPath:
        """The output of an input file; that of `x.jsonl.gz` is not compressed."""
        stem, dot, kind = name.removesuffix(".gz").rpartition(".")
        return self.output / (f"{stem}{self.worker.suffix}.{kind}" if dot else f"{kind}{self.worker.suffix}")

    def is_complete(self, name: str) -> bool:
        """Whether an earlier run has finished an input file.

        Raises:
            BicacheError: a bucket does not answer.
        """
        with self._faults():
            return exists(self.final(name))

    @contextlib.contextmanager
    def window(self, name: str, number: int, run: Mapping[str, Any], requests: int) -> Iterator[WindowJournal]:
        """Opens this worker's journal of a window.

        Args:
            name: the input file.
            number: the window.
            run: everything that determines its results.
            requests: how many requests it has, bad lines included.

        Raises:
            BicacheError: it cannot be written, or the journals there belong to another run.
        """
        header = {**run, "requests": requests}
        with self._faults():
            journal = self._open(name, number, header)
        try:
            journal.begin(header)
            yield journal
        finally:
            with self._faults():
                journal.close()

    def _open(self, name: str, number: int, header: Mapping[str, Any]) -> WindowJournal:
        folder = self._folder / name
        if not exists(self._folder / "run.json"):  # to begin again would be all for nothing
            raise BicacheError(f"{self._folder} has been removed: run again with --resume")
        if not is_remote(folder):
            folder.mkdir(exist_ok=True)
        target = folder / f"{number:06d}.{self.worker.name}.journal"
        others = {}
        for path in listed(folder, f"{number:06d}.*.journal"):
            if path != target:
                found, records = read_window(path)
                if records:
                    check_same_run(path, found, header_of(header))
                others.update({(record["id"], record["sample"]): record for record in records})
        path = target
        if self._spool is not None:
            path = Path(self._spool.name) / f"{name}.{target.name}"
            if exists(target):
                path.write_bytes(read_bytes(target))
        return WindowJournal(Journal(path, resume=True), others, target if path != target else None)

    def finish(self, windows: Mapping[str, Sequence[int]], read: Mapping[str, tuple[str, int]]) -> list[AnyPath]:
        """Says that this worker has finished, and if all have, puts the outputs together.

        Args:
            windows: windows that have requests, by input file, of the files that had to be worked on.
            read: the SHA-256 and the number of requests of each of these files.

        Returns:
            The outputs written; none as long as another worker is at work.

        Raises:
            BicacheError: they cannot be written, or results are missing.
        """
        with self.unless_over(), self._faults():
            if not self._put_together(windows, read):
                return []
        remove_folder(self._folder)
        return [self.final(name) for name in self._files]

    def _put_together(self, windows: Mapping[str, Sequence[int]], read: Mapping[str, tuple[str, int]]) -> bool:
        if self.is_over():  # a run may have been killed before it said what they were made from
            self._complete_manifest()
            return True
        write_whole(self._done(self.worker.number), [b"done\n"])
        if not all(exists(self._done(number)) for number in range(self.worker.count)) and not self.is_over():
            return False
        # Kept before the first output appears: a restart in the middle must know what it was made from.
        made = {self.final(name).name: Entry(self._run, *read[name]) for name in windows}
        write_manifest(self._noted, {**read_manifest(self._noted), **made}, self._temporary("inputs.json"))
        for name, numbers in windows.items():
            if not self.is_complete(name):
                try:
                    write_whole(self.final(name), self._results(name, numbers), self._temporary(name))
                except BicacheError:
                    if not self.is_complete(name):  # else: another worker was faster
                        raise
        self._complete_manifest()
        return True

    def _complete_manifest(self) -> None:
        """Says what the outputs were made from, unless another worker has said it and removed the notes."""
        noted = read_manifest(self._noted)  # before the manifest, which is written before this is removed
        entries = {**noted, **read_manifest(self._manifest)}
        new = [final for final in map(self.final, self._files) if final.name in noted]
        if not new:
            return
        for final in new:
            entries[final.name] = noted[final.name].with_output(final)
        write_manifest(self._manifest, entries, self._temporary("manifest.json"))

    def is_over(self) -> bool:
        """Whether all outputs are complete."""
        return all(map(self.is_complete, self._files))

    def is_settled(self) -> bool:
        """Whether all outputs are complete and the manifest says what they were made from.

        Raises:
            BicacheError: a bucket does not answer.
        """
        with self._faults():
            return self.is_over() and not exists(self._noted)

    @contextlib.contextmanager
    def unless_over(self) -> Iterator[None]:
        """Drops a fault where all outputs are complete: another worker has tidied up what this one looked for."""
        try:
            yield
        except BicacheError:
            if not self.is_over():
                raise

    def _temporary(self, name: str) -> AnyPath:
        """Where this worker puts a file together that others may write at the same time."""
        return self._folder / f"{name}.{self.worker.name}.tmp"

    def _done(self, number: int) -> AnyPath:
        return self._folder / f"{number:05d}-of-{self.worker.count:05d}.done"

    def close(self) -> None:
        """Removes what was kept on this machine only."""
        if self._spool is not None:
            self._spool.cleanup()

    def _results(self, name: str, windows: Sequence[int]) -> Iterator[bytes]:
        """Yields the lines of an output, a window in memory at a time."""
        return (dump(line) for line in self.format.lines(self._records(name, windows)) if line is not None)

    def _records(self, name: str, windows: Sequence[int]) -> Iterator[Record]:
        folder = self._folder / name
        for number in windows:
            requests = 0
            first: Record = {}
            found: dict[int, dict[int, Record]] = {}
            for path in listed(folder, f"{number:06d}.*.journal"):
                header, records = read_window(path)
                if records:  # workers may have read files of one name that differ
                    first = first or header
                    check_same_run(path, header, first)
                    requests = int(header["run"]["requests"])
                for record in records:
                    samples = found.setdefault(record["index"], {})
                    if samples.get(record["sample"], _ERROR)["finish_reason"] == "error":
                        samples[record["sample"]] = record
            if not requests:
                raise BicacheError(f"{folder}: there is no journal of window {number}; run again with --resume")
            for index in range(requests):
                yield from in_order(found.get(index, {}), f"{folder}, window {number}, request {index}")
        # State is removed when all outputs are there. If this one is not, nothing was missing in what was read here.
        if self.is_complete(name):
            raise BicacheError(f"another worker has written {self.final(name)}")
