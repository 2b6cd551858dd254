"""The engine for programs that are asked from many tasks and threads: requests join lanes as they come.

    async with AsyncEngine(Engine(model)) as engine:
        results = await engine.generate("...")

One thread runs the scheduler; a request is parsed where it is asked, and its results go to the event loop that waits
for them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from bicache_jax.core.types import BicacheError, Request, Result
from bicache_jax.serving.admission import Asked, Errors, Settings
from bicache_jax.serving.engine import Engine
from bicache_jax.serving.executor import Executor
from bicache_jax.serving.frames import SECONDS, Frames
from bicache_jax.serving.grouping import Row
from bicache_jax.serving.lane import Seen
from bicache_jax.serving.run_prefixes import RunPrefixes
from bicache_jax.serving.scheduler import Scheduler, result_of
from bicache_jax.serving.shadow import Agreement, Place, Shadows

PATIENCE = 5.0
"""Seconds after which a lane takes nobody in any more, where others wait for one."""


class _Job:
    """The rows of a call.

    Attributes:
        rows: those that are not finished.
        partial: whether unfinished rows are shown.
        tell: takes results, and what ended the job early; called from the engine's thread.
        ended: set when nothing more is told.
    """

    def __init__(self, rows: Sequence[Row], tell: Callable[[Any], None], *, partial: bool) -> None:
        self.rows, self.tell, self.partial = list(rows), tell, partial
        self.ended = threading.Event()


class AsyncEngine:
    """Runs requests as they come. All methods may be called from any thread or task.

    What `Engine` promises holds: a request's tokens do not depend on what else is asked.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int = 1024,
        lanes: int = 4,
        frame_seconds: float = SECONDS,
        shadow: float = 0.0,
    ) -> None:
        """Starts the thread that runs the requests.

        Args:
            engine: what runs them. Its own calls stay possible, and share its prefixes.
            max_queue: responses that may wait or be under way at once.
            lanes: batches of different shapes or settings that are open at once; they take turns.
            frame_seconds: how often requests join, are shown to those who stream them, and are cancelled.
            shadow: share of the responses that are made again without a prefix cache, in places that nobody else wants,
                to compare them (`shadows`).

        Raises:
            ValueError: a number is below 1, `frame_seconds` is negative, or `shadow` is not in 0..1.
        """
        if max_queue < 1 or lanes < 1:
            raise ValueError(f"max_queue and lanes must be >= 1, got {max_queue} and {lanes}")
        self._engine, self._max_queue, self._lanes, self._seconds = engine, max_queue, lanes, frame_seconds
        Frames(seconds=frame_seconds)  # raises where that is no time
        self._shadows = Shadows(shadow)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._jobs: dict[int, _Job] = {}  # by the identity of their rows
        self._count, self._closed, self._ending = 0, False, False
        self._scheduler: Scheduler
        self._thread = threading.Thread(target=self._work, name="bicache-engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"AsyncEngine({self._engine!r}, {self.pending} pending)"

    @property
    def engine(self) -> Engine:
        """What runs the requests."""
        return self._engine

    @property
    def pending(self) -> int:
        """Responses that wait or are under way."""
        return self._count

    @property
    def shadows(self) -> dict[Place, Agreement]:
        """How responses agree with those made without a prefix cache, by ratio (tens of percent) and boundary."""
        return self._shadows.found

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self,
        requests: Asked,
        *,
        sampling: Settings = None,
        errors: Errors = "raise",
        priority: int = 0,
        timeout: float | None = None,
        namespace: str = "",
    ) -> list[Result]:
        """Answers requests. Cancelling the task gives them up, and frees their places.

        Args:
            requests: as in `Engine.generate`; prefixes are found among these alone.
            sampling: as there.
            errors: as there.
            priority: requests of higher priority take free places first.
            timeout: seconds after which they are given up; None: never.
            namespace: as in `Engine.generate`.

        Returns:
            Results in the order of the requests, samples of a request in order.

        Raises:
            TypeError: as in `Engine.generate`.
            ValueError: as there.
            BicacheError: as there; or the queue is full, or the engine is closed.
            TimeoutError: they took longer than `timeout`.
        """
        found = []
        async with asyncio.timeout(timeout):
            async for place, result in self._ask(requests, sampling, errors, priority, namespace, partial=False):
                found.append((place, result))
        return [result for _, result in sorted(found, key=lambda one: (one[0], one[1].sample))]

    async def chat(self, messages: Asked, *, sampling: Settings = None, timeout: float | None = None) -> Result:
        """Answers a conversation; arguments and errors as in `Engine.chat` and `generate`."""
        return (await self.generate(self._engine.conversation(messages), sampling=sampling, timeout=timeout))[0]

    async def stream(
        self,
        requests: Asked,
        *,
        sampling: Settings = None,
        errors: Errors = "raise",
        priority: int = 0,
        namespace: str = "",
    ) -> AsyncIterator[Result]:
        """Answers requests, and shows their canvases while they are denoised, about every `frame_seconds`.

        Leaving the loop early and closing the iterator, or cancelling the task, gives them up.

        Args:
            requests: as in `generate`.
            sampling: as there.
            errors: as there.
            priority: as there.
            namespace: as there.

        Yields:
            Results as in `Engine.stream`: with `finish_reason` None while unfinished.

        Raises:
            TypeError: as in `generate`.
            ValueError: as there.
            BicacheError: as there.
        """
        async for _, result in self._ask(requests, sampling, errors, priority, namespace, partial=True):
            yield result

    async def drain(self) -> None:
        """Waits until all that was asked so far is answered or given up."""
        with self._lock:
            jobs = set(self._jobs.values())
        for job in jobs:
            await asyncio.to_thread(job.ended.wait)

    async def close(self, *, drain: bool = True) -> None:
        """Takes no more requests, and ends the thread.

        Args:
            drain: answer what was asked so far; otherwise it is given up, with an error to those who wait.
        """
        with self._lock:
            self._closed = True
        if drain:
            await self.drain()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _ask(
        self, requests: Asked, sampling: Settings, errors: Errors, priority: int, namespace: str, *, partial: bool
    ) -> AsyncIterator[tuple[int, Result]]:
        """Yields (place, result)."""
        entries, rows = self._engine.admitted(requests, sampling, errors, namespace)
        for place, entry in enumerate(entries):
            if isinstance(entry, Result):
                yield place, entry
        places = {id(entry): place for place, entry in enumerate(entries) if isinstance(entry, Request)}
        told: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(what: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.put_nowait, what)

        rows = [dataclasses.replace(row, priority=priority) for row in rows]
        job = _Job(rows, tell, partial=partial)
        self._enter(job)
        left = len(rows)
        try:
            while left:
                what = await told.get()
                if isinstance(what, BaseException):
                    raise what
                row, result = what
                left -= result.finish_reason is not None
                yield places[id(row.request)], result
        finally:
            if left:
                self._forget(job)
                self._inbox.put(lambda: self._free(job))

    def _enter(self, job: _Job) -> None:
        """Queues a job.

        Raises:
            BicacheError: the queue is full, or the engine is closed.
        """
        with self._lock:
            if self._closed:
                raise BicacheError("the engine is closed")
            if self._count + len(job.rows) > self._max_queue:
                raise BicacheError(
                    f"the queue is full: {self._count} responses are pending, {len(job.rows)} more would exceed"
                    f" max_queue={self._max_queue}; ask again later"
                )
            self._count += len(job.rows)
            self._jobs |= {id(row): job for row in job.rows}
            self._inbox.put(lambda: self._submit(job))

    def _forget(self, job: _Job, *rows: Row) -> None:
        """Rows of a job, all where none is named, are no longer pending, and nothing more is told of them."""
        with self._lock:
            for row in rows or job.rows:
                if self._jobs.pop(id(row), None) is not None:
                    self._count -= 1

    # What follows runs in the engine's thread.

    def _submit(self, job: _Job) -> None:
        for row in job.rows:
            self._place(row)

    def _place(self, row: Row) -> None:
        """Lets a row wait on the data shard with the fewest."""
        load = self._scheduler.load()
        self._scheduler.submit(row, load.index(min(load)))

    def _free(self, job: _Job) -> None:
        """Takes the rows of a job that is forgotten out of the lanes."""
        for row in job.rows:
            self._scheduler.cancel(row)
        job.rows = []
        job.ended.set()

    def _take(self, *, wait: bool = False) -> bool:
        """Does what was asked since the last time; False at the end."""
        while not self._ending:
            try:
                what = self._inbox.get(block=wait)
            except queue.Empty:
                break
            if what is None:
                self._ending = True
            else:
                what()
            wait = False
        return not self._ending

    def _work(self) -> None:
        """Runs requests until the engine is closed."""
        while not self._ending:
            self._scheduler, prefixes = self._engine.open_scheduler(self._lanes, PATIENCE)
            try:
                self._serve(prefixes)
            except Exception as fault:  # such as no memory: who waits is told, and others may try
                self._end_all(fault)
            finally:
                prefixes.close()
        self._end_all(BicacheError("the engine was closed"))

    def _end_all(self, why: BaseException) -> None:
        with self._lock:
            jobs = dict.fromkeys(self._jobs.values())
        for job in jobs:
            self._forget(job)
            self._free(job)
            job.tell(why)

    def _serve(self, prefixes: RunPrefixes) -> None:
        """Serves with one scheduler, while the engine has the same weights."""
        executor, frames = self._engine.executor, Frames(seconds=self._seconds)
        while self._engine.executor is executor and self._take(wait=True):
            for seen in self._scheduler.run(frames, shown=self._is_shown, between=self._take):
                self._deliver(executor, seen)
            prefixes.save()

    def _is_shown(self, row: Row) -> bool:
        job = self._jobs.get(id(row))
        return job is not None and job.partial

    def _deliver(self, executor: Executor, seen: Seen) -> None:
        result, job = result_of(executor, seen), self._jobs.get(id(seen.row))
        if job is None:  # a shadow, or given up meanwhile
            self._shadows.compare(seen.row, result, executor.drift)
            return
        if seen.done:  # before who waits is told: they may look
            self._forget(job, seen.row)
            job.rows = [row for row in job.rows if row is not seen.row]
        if result is not None:
            job.tell((seen.row, result))
        if seen.done and result is not None and (shadow := self._shadows.of(seen.row, result)) is not None:
            self._place(shadow)
        if not job.rows:
            job.ended.set()
