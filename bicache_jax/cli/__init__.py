"""The command `bicache`: one file a subcommand, and one place that turns faults into an exit status and a line.

A subcommand is a module with `HELP`, `DESCRIPTION`, `EPILOG`, `add_arguments(parser)` and `run(args) -> int`. It
imports jax inside `run` only, so that `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

from bicache_jax.cli import aot, batch, benchmark, convert, doctor, evaluate, generate, lm_eval, plan, profile, score
from bicache_jax.cli.interrupt import EXIT_INTERRUPTED, say_interrupted
from bicache_jax.cli.options import Parser
from bicache_jax.cli.outputs import abandon
from bicache_jax.core.libtpu import expect_no_tpu
from bicache_jax.core.types import BicacheError
from bicache_jax.core.version import version

COMMANDS = {
    "generate": generate,
    "batch": batch,
    "score": score,
    "plan": plan,
    "profile": profile,
    "evaluate": evaluate,
    "lm-eval": lm_eval,
    "benchmark": benchmark,
    "convert": convert,
    "aot": aot,
    "doctor": doctor,
}

EXIT_FAULT = 2
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="bicache", description="Runs diffusion language models (LLaDA, Dream) in JAX with BiCache prefix caching."
    )
    parser.add_argument("--version", action="version", version=f"bicache {version()}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        0 if all is well, 1 where programs do not fit a device or a check of it fails, 2 for bad flags and unreadable
        files, 3 if some results are errors, 130 after Ctrl-C, 141 where the reader of standard output went away.
    """

    def command() -> int:
        args = build_parser().parse_args(argv)
        return COMMANDS[args.command].run(args)

    return say_faults(command)


def say_faults(command: Callable[[], int]) -> int:
    """Runs a command; returns its exit status, or that of a fault, which is reported in one line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = command()
            sys.stdout.flush()  # a closed pipe shows up here, not when the interpreter exits
            return status
    except BicacheError as error:
        print(f"bicache: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt as interrupt:
        say_interrupted(str(interrupt))
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        abandon(sys.stdout.buffer)
        return EXIT_CLOSED_PIPE


def entry() -> None:
    """Runs the command and ends the process."""
    expect_no_tpu()
    leave_process(main)


def leave_process(command: Callable[[], int]) -> NoReturn:
    """Ends the process with a command's status, whatever jax still has running."""
    try:
        status = command()
    except Exception:
        traceback.print_exc()
        status = 1
    jax = sys.modules.get("jax")
    # Shutting down in the middle of XLA's work may crash, and jax's threads for other processes would wait for them.
    if status == EXIT_INTERRUPTED or (jax is not None and jax.distributed.is_initialized()):
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning):  # ours; deprecations in libraries are no business of the user
        print(f"bicache: warning: {' '.join(str(message).split())}", file=sys.stderr)
