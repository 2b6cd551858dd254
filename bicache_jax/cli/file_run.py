"""A file of requests that becomes a file of what they get: what `generate` and `score` have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from bicache_jax.cli.interrupt import ends_at_once
from bicache_jax.cli.outputs import open_output
from bicache_jax.cli.report import Progress
from bicache_jax.core.types import Record
from bicache_jax.serving.inputs import Requests, read_requests
from bicache_jax.serving.results import ResultFormat

EXIT_ERRORS = 3


def status(records: Sequence[Record]) -> int:
    """The exit status of these results."""
    return EXIT_ERRORS if any(record["finish_reason"] == "error" for record in records) else 0


class FileRun:
    """The run of a command over `--input`, for `--output`; a context in which SIGINT says how to continue.

    Attributes:
        requests: the input, to be parsed.
        output: where results go.
        resumed: results taken from a journal.
    """

    def __init__(self, args: argparse.Namespace, noun: str, *, stream: bool = False) -> None:
        """Opens nothing yet.

        Args:
            args: flags of the command.
            noun: what results are called, in the plural.
            stream: whether standard output is taken by events.
        """
        self._args, self._noun, self._stream = args, noun, stream
        self._progress: Progress | None = None
        self.resumed = 0

    def __enter__(self) -> FileRun:
        args = self._args
        with ExitStack() as stack:
            stack.enter_context(ends_at_once(self._last_words))
            self.requests: Requests[Any] = read_requests(args.input)
            # The output comes before the model: a bad output must not cost a load.
            self.output = open_output(
                args.output, args.input, resume=args.resume, stream=self._stream, overwrite=args.overwrite
            )
            stack.callback(self.output.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _last_words(self) -> str:
        if self._progress is not None:
            self._progress.close()
        return self.output.last_words() if hasattr(self, "output") else ""

    def begin(self, output_format: ResultFormat, run: Mapping[str, Any]) -> int | None:
        """Takes in what an earlier run has finished.

        Args:
            output_format: how results are written.
            run: everything that determines results.

        Returns:
            The exit status, said with a line, where that is everything; else None.

        Raises:
            BicacheError: it was another run.
        """
        self.output.format = output_format
        self.output.begin(self.requests, run)
        self.resumed = len(self.output.finished)
        complete = self.output.complete
        if complete is None:
            return None
        if not self._args.quiet:
            errors = f", {complete.errors} of them errors" if complete.errors else ""
            print(f"bicache: {self._args.output} is complete: {complete.results} {self._noun}{errors}", file=sys.stderr)
        return EXIT_ERRORS if complete.errors else 0

    def collect(
        self, records: Iterable[Record], *, bar: bool, show: Callable[[Record], None] = lambda record: None
    ) -> list[Record]:
        """Keeps results as they are finished.

        Args:
            records: results, finished or not.
            bar: whether a bar is shown.
            show: called with each of them first.

        Returns:
            All finished ones, in input order, those of earlier runs too.
        """
        self._progress = Progress(self.requests, self.resumed, quiet=not bar)
        self._stack.callback(self._progress.close)
        try:
            for record in records:
                show(record)
                if record["finish_reason"] is not None:
                    self.output.add(record)
                    self._progress.update()
            return self.output.finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.output.last_words()) from None
