"""`bicache batch`: inputs of any size on one device or a pod, through preemptions."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import ExitStack
from tempfile import TemporaryDirectory

from bicache_jax.bulk import workers
from bicache_jax.bulk.job import Job, Stopped
from bicache_jax.bulk.state import State, Worker
from bicache_jax.bulk.storage import inputs
from bicache_jax.cli import backend
from bicache_jax.cli.file_run import EXIT_ERRORS
from bicache_jax.cli.generate import (
    add_answering_arguments,
    add_running_arguments,
    configurations,
    result_format,
)
from bicache_jax.cli.interrupt import ends_at_once
from bicache_jax.cli.options import Parser, integer
from bicache_jax.core.types import BicacheError

HELP = "answer files of any size, on a pod too, through kills and restarts"
DESCRIPTION = """\
Answers files of requests as 'bicache generate' does, with its flags, however large they are and however often the job
is killed. Every process reads the input in windows of requests and answers its own part on its own devices."""
EPILOG = """\
Results of requests.jsonl are in OUTPUT/requests.jsonl, in input order, as 'bicache generate' writes them; those of
requests.jsonl.gz, too. They appear when the file is done; until then what is finished is in OUTPUT/_state. Then
OUTPUT/_manifest.json says what the outputs were made from. Statistics are JSON lines in OUTPUT/_stats.

exit status: 0 all is well, or stopped by SIGTERM with everything finished kept; 2 bad flags or an unreadable file; 3
all is done and some requests have an error as their result; 130 interrupted.

examples:
  bicache batch --model example --input examples/requests.jsonl --output results
  bicache batch --model ./LLaDA-8B-orbax --input 'gs://bucket/in/*.jsonl' --output gs://bucket/out \\
      --distributed --resume"""


def add_arguments(parser: Parser) -> None:
    """Adds the flags of `batch`."""
    files = parser.add_argument_group("input and output")
    files.add_argument(
        "--input", required=True, nargs="+", metavar="FILE", help="paths or globs, also .gz; gs://, s3:// without **"
    )
    files.add_argument("--output", required=True, metavar="FOLDER", help="where results go; gs:// and s3:// too")
    again = files.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue what an earlier run left, if anything")
    again.add_argument(
        "--overwrite", action="store_true", help="delete what an earlier run left or finished for these inputs"
    )
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
    add_answering_arguments(parser)


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, got {text!r}")
    return int(part), int(parts)


def run(args: argparse.Namespace) -> int:
    """Runs `bicache batch`; returns the exit status."""
    settings = configurations(args)  # bad flags cost no meeting and no load
    files = inputs(args.input)
    number, count = workers.join(
        distributed=args.distributed,
        coordinator=args.coordinator,
        processes=args.num_processes,
        process=args.process_id,
        heartbeat_seconds=args.heartbeat_seconds,
    )
    worker = Worker(number, count, args.shard)
    if args.overwrite and count > 1:
        raise BicacheError(
            f"--overwrite: one of several processes may delete what another has begun; delete {args.output} instead"
        )
    job: Job | None = None
    kept = "what was finished is kept; the same command with --resume continues"
    with ExitStack() as stack:
        stack.enter_context(ends_at_once(lambda: kept if job is not None else ""))
        output = stack.enter_context(TemporaryDirectory()) if args.dry_run else args.output
        state = State(output, files, worker, resume=args.resume, overwrite=args.overwrite, format=result_format(args))
        stack.callback(state.close)
        session = backend.open_session(args, *settings, alone=count > 1)
        job = Job(
            session,
            worker,
            files,
            state,
            window=args.window,
            report_seconds=args.report_seconds,
            quiet=args.quiet,
        )
        if args.dry_run:
            print(job.describe())
            return 0
        before = signal.signal(signal.SIGTERM, lambda *_: job.stop.set())
        stack.callback(signal.signal, signal.SIGTERM, before)
        try:
            written = job.work() or workers.wait_for_others(job, state, worker)
        except Stopped:
            print(f"bicache: stopped by SIGTERM: {job.remains}; {kept}", file=sys.stderr, flush=True)
            workers.leave(worker, args.leave_seconds)
            return int(args.stopped_status)
        if written and not args.quiet:
            print(f"bicache: complete: {', '.join(map(str, written))}", file=sys.stderr)
        workers.leave(worker, args.leave_seconds)
    return int(args.errors_status) if job.errors else 0
