"""One worker's part of a bulk job: windows read, divided, answered and journalled.

Every worker (process) reads the input in windows of requests, finds shared prefixes in each, computes the same division
of prefix groups over workers, answers its own part on its own devices, and writes each result to its journal as it is
finished. Workers exchange nothing but files in the output folder, so a worker may be killed at any moment, and a
restart with as many workers or more or fewer continues from every result that was finished.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bicache_jax.bulk.manifest import digest_of
from bicache_jax.bulk.progress import Progress
from bicache_jax.bulk.state import State, Worker
from bicache_jax.bulk.storage import AnyPath, size_of
from bicache_jax.bulk.windows import Window, ahead, windows
from bicache_jax.core.types import Request, Result
from bicache_jax.serving.inputs import Requests

if TYPE_CHECKING:
    from bicache_jax.serving.session import Session

LOOK_SECONDS = 1.0  # between looks at whether to stop


class Stopped(Exception):
    """SIGTERM came, and the steps that were running then are finished."""


class Job:
    """What one worker does.

    Attributes:
        errors: requests of this worker that have an error as their result, and those of outputs that were finished.
        remains: what is not done, in words.
    """

    def __init__(
        self,
        session: Session,
        worker: Worker,
        files: Sequence[AnyPath],
        state: State,
        *,
        window: int,
        report_seconds: float = 30.0,
        quiet: bool = False,
    ) -> None:
        """Checks that the state is of the same run.

        Args:
            session: what answers.
            worker: which worker this is.
            files: the input files.
            state: what has been done.
            window: requests in memory at a time.
            report_seconds: between reports.
            quiet: whether to tell people nothing.

        Raises:
            BicacheError: the state belongs to another run.
        """
        self._worker, self._files, self._state, self._size, self._run = worker, files, state, window, session
        run = session.identity(Requests("", [], ""))
        self._identity: dict[str, Any] = {"window": window}
        if run.get("batch_boundary") == "min":  # only then do results depend on who is batched with whom
            self._identity["workers"] = worker.count
        self._identity |= state.format.identity
        settings = {name: value for name, value in run.items() if name not in ("input", "tokens")}
        finished = state.begin({**settings, **self._identity})
        self.errors = sum(entry.errors for entry in finished)
        self._progress = Progress(
            state.output / "_stats" / f"{worker.name}{worker.suffix}.jsonl",
            worker.name,
            sum(map(size_of, files)),
            every=report_seconds,
            say=worker.number == 0 and not quiet,
            stats=lambda: session.stats,
        )
        self._read: dict[str, tuple[str, int]] = {}  # hash and requests of each of these files
        self._windows: dict[str, list[int]] = {}  # of the files that this worker has worked on
        self.stop = threading.Event()
        self.remains = "the whole input remains"

    def describe(self) -> str:
        """The plan of the first window of each file, for people."""
        lines = []
        for path in self._files:
            for window in windows(path, self._run.iterate, self._size):
                _, _, workers = self._divide(window)
                lines += [
                    f"{path}, first {len(window.requests.items)} requests:",
                    self._run.describe(window.requests.valid),
                ]
                lines += [f"requests of each worker: {[workers.count(n) for n in range(self._worker.count)]}", ""]
                break
        return "\n".join(lines)

    def work(self) -> list[AnyPath]:
        """Answers this worker's part; returns the outputs that are complete with it.

        Raises:
            Stopped: by SIGTERM.
        """
        for path in self._files:
            if self._state.is_complete(path.name):
                self._progress.skip(size_of(path))
                continue
            with self._state.unless_over():
                self._windows[path.name] = self._work_on(path)
        self._progress.report(finished=True)
        return self.finish()

    def finish(self) -> list[AnyPath]:
        """Puts the outputs together if all workers have finished; returns them."""
        return self._state.finish(self._windows, self._read)

    def _work_on(self, path: AnyPath) -> list[int]:
        """Answers this worker's part of a file; returns the windows in which this slice has requests."""
        begin, answered = 0, []
        self._read[path.name] = digest_of([]), 0
        for window, items, workers in ahead(map(self._divide, windows(path, self._run.iterate, self._size))):
            if self._answer(path, window, items, workers, window.end - begin):
                answered.append(window.number)
            begin = window.end
            self._read[path.name] = window.digest, window.first + len(window.requests.items)
        return answered

    def _divide(self, window: Window) -> tuple[Window, list[Request | Result], list[int]]:
        """A window, this slice's part of it with prefixes found among all of it, and the worker of each request."""
        part, parts = self._worker.shard
        settled = self._run.settle(window.requests.valid)
        sliced = [item for item, at in zip(settled, self._run.divide(settled, parts), strict=True) if at == part]
        workers = dict(zip((item.id for item in sliced), self._run.divide(sliced, self._worker.count), strict=True))
        found = {item.id: item for item in sliced}
        items: list[Request | Result] = []
        for item in window.requests.items:
            if isinstance(item, Request):
                items += [found[item.id]] if item.id in found else []
            elif part == 0:  # bad lines are the first worker's of the first slice
                items.append(item)
        return window, items, [workers[item.id] if isinstance(item, Request) else 0 for item in items]

    def _answer(
        self, path: AnyPath, window: Window, items: Sequence[Request | Result], workers: Sequence[int], size: int
    ) -> bool:
        """Answers this worker's part of a window; returns whether there is anything of this slice in it."""
        mine = [place for place, worker in enumerate(workers) if worker == self._worker.number]
        if not items:
            self._progress.skip(size)
            return False
        run = {**self._run.identity(window.requests), **self._identity}
        with self._state.window(path.name, window.number, run, len(items)) as journal:
            places, todo = {}, []
            for place in mine:
                item = items[place]
                if isinstance(item, Request):
                    places[item.id] = place
                    todo.append(item)
                    continue
                self.errors += 1
                if place not in journal.errors:
                    journal.add(item.to_record(), index=place, of=1)
            total = sum(request.n for request in todo)
            kept = sum((request.id, sample) in journal.finished for request in todo for sample in range(request.n))
            each = size / total if total else 0.0
            self._progress.skip(each * kept if total else size, kept)
            done = kept
            for record in self._run.stream(todo, journal.finished, partial=True, frame_seconds=LOOK_SECONDS):
                if record["finish_reason"] is not None:
                    place = places[record["id"]]
                    item = items[place]
                    assert isinstance(item, Request)
                    journal.add(record, index=place, of=item.n)
                    self.errors += record["finish_reason"] == "error"
                    done += 1
                    self._progress.advance(each)
                if self.stop.is_set() and done < total:
                    self._progress.report(stopped=True)
                    after = self._progress.rest(size - each * done)
                    self.remains = (
                        f"{total - done} of this worker's {total} results in window {window.number} of {path.name}"
                        f" remain, and the {after:.1%} of the input after it"
                    )
                    raise Stopped
        return True
