"""`bicache batch` as a program, for launch files that name one.

python scripts/batch_inference.py --model M --input 'requests/*.jsonl' --output results --resume
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bicache_jax.cli import batch, leave_process, say_faults
from bicache_jax.cli.options import Parser


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="batch_inference.py",
        description=batch.DESCRIPTION,
        epilog=batch.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status, faults reported in one line."""
    return say_faults(lambda: batch.run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    leave_process(main)
