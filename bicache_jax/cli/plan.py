"""`bicache plan`: what `bicache generate` would do, without doing it."""

from __future__ import annotations

import argparse

from bicache_jax.cli.generate import add_running_arguments, show_plan
from bicache_jax.cli.options import Parser

HELP = "show what generate would do with a file of requests: groups, boundaries, shapes, memory, gain"
DESCRIPTION = """\
Reads requests and loads the model as 'bicache generate' with the same flags does, and prints how it would run them:
which requests share a prefix and a batch, their boundaries, the shapes in buckets, the memory of a device, and how much
faster than no cache it can be. Nothing is generated."""
EPILOG = """\
exit status: 0 all is well, 2 bad flags or an unreadable file, 3 some requests are errors.

examples:
  bicache plan --model example --input examples/requests.jsonl
  bicache plan --model ./LLaDA-8B-Instruct --input requests.jsonl --gen-length 256 --mesh data=4,model=2 --json"""


def add_arguments(parser: Parser) -> None:
    """Adds the flags of `plan`."""
    files = parser.add_argument_group("input and output")
    files.add_argument("--input", required=True, metavar="FILE", help="requests, JSON lines; - reads standard input")
    files.add_argument("--json", action="store_true", help="print one JSON object instead of a table; sizes in bytes")
    add_running_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `bicache plan`; returns the exit status."""
    return show_plan(args, as_json=args.json)
