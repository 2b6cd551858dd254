"""Answers inputs of any size on one device or a pod, through preemptions.

    python scripts/batch_inference.py --model M --input 'requests/*.jsonl' --output results --resume

Every worker (process) reads the input in windows of requests, finds shared prefixes in each, computes the same division
of prefix groups over workers, answers its own part on its own devices, and writes each result to its journal as it is
finished. Nothing is exchanged between workers but files in OUTPUT, so a worker may be killed at any moment, and a
restart with `--resume`, with as many workers or more or fewer, goes on from every result that was finished.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from tempfile import TemporaryDirectory
from typing import Any

from bicache_jax.bulk.progress import Progress
from bicache_jax.bulk.state import State, Worker
from bicache_jax.bulk.storage import AnyPath, inputs, size_of
from bicache_jax.bulk.windows import Window, ahead, windows
from bicache_jax.cli import EXIT_FAULT, backend
from bicache_jax.cli.generate import EXIT_ERRORS, add_running_arguments, configurations
from bicache_jax.cli.interrupt import EXIT_INTERRUPTED, ends_at_once, say_interrupted
from bicache_jax.cli.options import Parser, integer
from bicache_jax.core.types import BicacheError, Request, Result
from bicache_jax.serving.inputs import Requests

EPILOG = """\
Results of requests.jsonl are in OUTPUT/requests.jsonl, in input order, as `bicache generate` writes them. They appear
when the file is done; until then what is finished is in OUTPUT/_state. Statistics are JSON lines in OUTPUT/_stats.

exit status: 0 all is well, or stopped by SIGTERM with everything finished kept; 2 bad flags or an unreadable file; 3
all is done and some requests have an error as their result; 130 interrupted.

examples:
  python scripts/batch_inference.py --model example --input examples/requests.jsonl --output results
  python scripts/batch_inference.py --model ./LLaDA-8B-orbax --input 'gs://bucket/in/*.jsonl' \\
      --output gs://bucket/out --distributed --resume"""


POLL_SECONDS = 1.0  # between looks at whether the outputs are complete
POLLS = 600  # until worker 0 looks whether it could complete them, and until failing looks end a worker
TRIES = 3  # of worker 0 to complete them


class Stopped(Exception):
    """SIGTERM came, and the interval that was running then is finished."""


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="batch_inference.py",
        description=(__doc__ or "").partition("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = parser.add_argument_group("input and output")
    files.add_argument(
        "--input", required=True, nargs="+", metavar="FILE", help="paths or globs; gs://, s3:// too, without **"
    )
    files.add_argument("--output", required=True, metavar="FOLDER", help="where results go; gs:// and s3:// too")
    files.add_argument("--resume", action="store_true", help="go on with what an earlier run left, if it left anything")
    files.add_argument(
        "--window",
        type=integer(1),
        default=10000,
        metavar="N",
        help="requests in memory at a time, among which prefixes are shared (default: %(default)s)",
    )
    files.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="answer slice I (0 to N-1) of N, independent of the rest",
    )
    files.add_argument(
        "--report-seconds", type=integer(1), default=30, metavar="S", help="between reports (default: %(default)s)"
    )
    ends = parser.add_argument_group("exit status", "for schedulers that know done (0) and failed only")
    ends.add_argument(
        "--stopped-status", type=integer(0, 255), default=0, metavar="N", help="after SIGTERM (default: %(default)s)"
    )
    ends.add_argument(
        "--errors-status",
        type=integer(0, 255),
        default=EXIT_ERRORS,
        metavar="N",
        help="if some requests have an error as their result (default: %(default)s)",
    )
    many = parser.add_argument_group("several processes", "one per host; the same command on each")
    many.add_argument(
        "--distributed", action="store_true", help="let jax find the others, as it can on Cloud TPU, GKE and Slurm"
    )
    env = os.environ.get
    many.add_argument(
        "--coordinator",
        default=env("JAX_COORDINATOR_ADDRESS"),
        metavar="HOST:PORT",
        help="where process 0 is (default: $JAX_COORDINATOR_ADDRESS)",
    )
    many.add_argument(
        "--num-processes",
        type=integer(1),
        default=env("JAX_NUM_PROCESSES"),
        metavar="N",
        help="how many there are (default: $JAX_NUM_PROCESSES)",
    )
    many.add_argument(
        "--process-id",
        type=integer(0),
        default=env("JAX_PROCESS_ID"),
        metavar="I",
        help="which one this is (default: $JAX_PROCESS_ID)",
    )
    many.add_argument(
        "--heartbeat-seconds",
        type=integer(1),
        default=100,
        metavar="S",
        help="after this long without a sign of one process, jax ends the others (default: %(default)s)",
    )
    many.add_argument(
        "--leave-seconds",
        type=integer(0),
        default=20,
        metavar="S",
        help="after SIGTERM a process that has finished its interval waits this long for the others, which jax ends"
        " when process 0 is gone; less than there is between SIGTERM and the end (default: %(default)s)",
    )
    add_running_arguments(parser)
    return parser


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, got {text!r}")
    return int(part), int(parts)


def join(args: argparse.Namespace) -> tuple[int, int]:
    """Meets the other processes; returns which one this is, and how many there are.

    Raises:
        BicacheError: they cannot be found.
    """
    if not (args.distributed or args.coordinator):
        return 0, 1
    import jax

    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            heartbeat_timeout_seconds=args.heartbeat_seconds,
        )
    except (RuntimeError, ValueError) as error:
        raise BicacheError(f"cannot join the other processes: {str(error).splitlines()[0]}") from None
    return jax.process_index(), jax.process_count()


class Job:
    """What one worker does.

    Attributes:
        errors: requests of this worker that have an error as their result.
        remains: what is not done, in words.
    """

    def __init__(self, args: argparse.Namespace, worker: Worker, files: Sequence[AnyPath], state: State) -> None:
        """Loads the model, and checks that the state is of the same run.

        Raises:
            BicacheError: the model cannot be read, flags do not fit it, or the state belongs to another run.
        """
        self._worker, self._files, self._state, self._size = worker, files, state, args.window
        self._run = backend.Run(args, *configurations(args), alone=worker.count > 1)
        nothing = self._run.identity(Requests("", [], ""))
        self._identity: dict[str, Any] = {"window": args.window}
        if args.batch_boundary == "min":  # only then do results depend on who is batched with whom
            self._identity["workers"] = worker.count
        state.begin({**nothing, **self._identity, "input": [path.name for path in files], "tokens": None})
        self._progress = Progress(
            state.output / "_stats" / f"{worker.name}{worker.suffix}.jsonl",
            worker.name,
            sum(map(size_of, files)),
            every=args.report_seconds,
            say=worker.number == 0 and not args.quiet,
            stats=lambda: self._run.stats,
        )
        self._windows: dict[str, list[int]] = {}  # of the files that this worker has worked on
        self.stop = threading.Event()
        self.errors = 0
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
        return self._state.finish(self._windows)

    def _work_on(self, path: AnyPath) -> list[int]:
        """Answers this worker's part of a file; returns the windows in which this slice has requests."""
        begin, answered = 0, []
        for window, items, workers in ahead(map(self._divide, windows(path, self._run.iterate, self._size))):
            if self._answer(path, window, items, workers, window.end - begin):
                answered.append(window.number)
            begin = window.end
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
                    journal.add(item.to_json(), index=place, of=1)
            total = sum(request.n for request in todo)
            kept = sum((request.id, sample) in journal.finished for request in todo for sample in range(request.n))
            each = size / total if total else 0.0
            self._progress.skip(each * kept if total else size, kept)
            done = kept
            for record in self._run.stream(todo, journal.finished, partial=True):
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
                        f" remain, and the {after:.1%} of the input behind it"
                    )
                    raise Stopped
        return True


def run(args: argparse.Namespace) -> int:
    """Runs the program; returns the exit status."""
    configurations(args)  # bad flags cost no meeting and no load
    files = inputs(args.input)
    number, count = join(args)
    worker = Worker(number, count, args.shard)
    job: Job | None = None
    kept = "what was finished is kept; the same command with --resume goes on"
    with ExitStack() as stack:
        stack.enter_context(ends_at_once(lambda: kept if job is not None else ""))
        output = stack.enter_context(TemporaryDirectory()) if args.dry_run else args.output
        state = State(output, files, worker, resume=args.resume)
        stack.callback(state.close)
        job = Job(args, worker, files, state)
        if args.dry_run:
            print(job.describe())
            return 0
        before = signal.signal(signal.SIGTERM, lambda *_: job.stop.set())
        stack.callback(signal.signal, signal.SIGTERM, before)
        try:
            written = job.work() or wait_for_others(job, state, worker)
        except Stopped:
            print(f"bicache: stopped by SIGTERM: {job.remains}; {kept}", file=sys.stderr, flush=True)
            leave(worker, args.leave_seconds)
            return int(args.stopped_status)
        if written and not args.quiet:
            print(f"bicache: complete: {', '.join(map(str, written))}", file=sys.stderr)
        leave(worker, args.leave_seconds)
    return int(args.errors_status) if job.errors else 0


def wait_for_others(job: Job, state: State, worker: Worker) -> list[AnyPath]:
    """Waits until the outputs are complete; returns them if this worker had to complete them.

    Process 0 must outlive the others, and whoever is done first must not look dead.

    Raises:
        Stopped: by SIGTERM.
        BicacheError: looks at the outputs fail for long.
    """
    failed = tried = 0
    for poll in itertools.count(1):
        try:
            if state.is_over():
                break
            failed = 0
        except BicacheError:  # a bucket that is busy for a moment must not end a worker that has done its part
            failed += 1
            if failed >= POLLS:
                raise
        if job.stop.wait(POLL_SECONDS):
            job.remains = "nothing of this worker's part remains, and something of others' does"
            raise Stopped
        # A network file system may have shown to none of them, when it was done, that all others were.
        if worker.number == 0 and poll % POLLS == 0:
            try:
                if written := job.finish():
                    return written
            except BicacheError:
                tried += 1
                if tried >= TRIES:
                    raise
    return []


def leave(worker: Worker, seconds: float) -> None:
    """Takes leave of the other processes, if they do so too; after a while, without."""
    if worker.count == 1:
        return
    import jax

    def shutdown() -> None:
        with suppress(Exception):  # the others may be gone
            jax.distributed.shutdown()

    thread = threading.Thread(target=shutdown, daemon=True)
    thread.start()
    thread.join(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program, faults as one line."""
    try:
        return run(build_parser().parse_args(argv))
    except BicacheError as error:
        print(f"bicache: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt:
        say_interrupted("")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # jax's threads for other processes would keep an interpreter that shuts down
