"""How far a worker is: statistics as JSON lines, and now and then a line for people."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from bicache_jax.bulk.storage import AnyPath, exists, faults, is_remote, read_bytes, write_whole
from bicache_jax.core.types import BicacheError

STATISTICS = (
    "rows",
    "tokens",
    "forward_passes",
    "prefixes_encoded",
    "prefix_hits",
    "batches",
    "compilations",
    "compile_seconds",
    "seconds",
)

BURST_SECONDS = 0.2  # results that come closer together are of one batch
LONG_SECONDS = 10.0  # of a burst in which results keep coming: then it counts as it is


class Progress:
    """Counts results, and reports when it is time to.

    Attributes:
        place: bytes of the input that are done.
    """

    def __init__(
        self,
        path: AnyPath,
        worker: str,
        total: int,
        *,
        every: float,
        say: bool,
        stats: Callable[[], Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins to count.

        Args:
            path: where statistics are appended.
            worker: its name.
            total: bytes of the input.
            every: seconds between reports.
            say: whether to tell people, too.
            stats: gives the engine's counts.
            clock: tells the time.
        """
        self._path, self._worker, self._total = path, worker, max(1, total)
        self._every, self._say, self._stats = every, say, stats
        self._clock = clock
        self._started = self._reported = self._burst = self._last = clock()
        self._worked = 0.0
        self._paced = (0.0, 0.0)  # seconds of work, and bytes done in them, up to the last burst of results
        self._results = self._resumed = 0
        self._skipped = 0.0  # share of the input that earlier runs have done
        self.place = 0.0
        self._lost = False
        with faults(f"cannot write --output {path}"):
            self._kept = read_bytes(path) if is_remote(path) and exists(path) else b""

    def skip(self, size: float, results: int = 0) -> None:
        """Bytes of the input, and results, that an earlier run has done."""
        self.place += size
        self._skipped += size
        self._resumed += results

    def advance(self, size: float, results: int = 1) -> None:
        """Bytes of the input, and results, that are done now; reports if it is time to."""
        now = self._clock()
        # Results of a batch come in a burst, long after the one before: in the middle of it, its time has passed and
        # most of its results have not come. So the pace is that up to the end of the last whole burst.
        if now - self._last > BURST_SECONDS or now - self._burst > LONG_SECONDS:
            if self._results:
                self._paced = (self._worked, self.place - self._skipped)
            self._burst = now
        self._last, self._worked = now, self._work(now)
        self.place += size
        self._results += results
        if now - self._reported >= self._every:
            self.report()

    def _work(self, now: float) -> float:
        """Seconds of work so far: compilation is over some time, and says nothing of what is left."""
        return now - self._started - float(getattr(self._stats(), "compile_seconds", 0.0))

    def _left(self, share: float) -> float | None:
        """Seconds left; None until there is something to estimate them from."""
        if share >= 1.0:
            return 0.0
        seconds, done = self._paced
        if done <= 0 or seconds <= 0:
            return None
        return seconds * (1.0 - share) * self._total / done

    def rest(self, beyond: float = 0.0) -> float:
        """Share of the input that is left after the next `beyond` bytes."""
        return max(0.0, 1.0 - (self.place + beyond) / self._total)

    def report(self, **more: Any) -> None:
        """Writes a line of statistics; `more` goes into it."""
        self._reported = now = self._clock()
        seconds = now - self._started
        share = min(1.0, self.place / self._total)
        left = self._left(share)
        stats = self._stats()
        counts = {name: getattr(stats, name) for name in STATISTICS if hasattr(stats, name)}
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "worker": self._worker,
            "progress": round(share, 6),
            "elapsed_seconds": round(seconds, 3),
            "eta_seconds": None if left is None else round(left, 1),
            "results": self._results,
            "results_resumed": self._resumed,
            "tokens_per_second": round(counts.get("tokens", 0) / seconds, 3) if seconds else 0.0,
            **counts,
            **more,
        }
        self._write(json.dumps(line).encode() + b"\n")
        if self._say:
            eta = "unknown time" if left is None else str(datetime.timedelta(seconds=round(left)))
            print(
                f"bicache: {share:.1%} of the input, {self._results} results, {line['tokens_per_second']:.0f} tokens/s,"
                f" {eta} left",
                file=sys.stderr,
                flush=True,
            )

    def _write(self, line: bytes) -> None:
        """Writes a line. No result is worth less without it, so what cannot be written ends nothing."""
        try:
            with faults(f"cannot write {self._path}"):
                if is_remote(self._path):  # an object cannot be appended to
                    self._kept += line
                    write_whole(self._path, [self._kept])
                    return
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab") as file:
                    file.write(line)
        except BicacheError as error:
            if not self._lost:
                print(f"bicache: warning: statistics are not kept: {error}", file=sys.stderr, flush=True)
            self._lost = True
