"""`bicache doctor`: is everything right on this machine?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bicache_jax.cli import backend
from bicache_jax.cli.options import integer

if TYPE_CHECKING:
    from bicache_jax.measure.doctor import Check

HELP = "check that everything is right on the device that is here, and how fast it is"
DESCRIPTION = """\
Prints versions, devices and which attention serves here; holds every implementation of prefix attention that runs here
to float64; compares the bundled model's answers with recorded ones; and measures the peaks of matrix products and
memory. Kernels of other platforms are run in Pallas's interpreter on a CPU. No network, no test suite."""
EPILOG = """\
exit status: 0 all is well, 1 something is wrong and named, 2 it cannot run.

examples:
  bicache doctor
  bicache doctor --output devices    # devices/<kind of device>.json, to send along with a question"""

EXIT_WRONG = 1
ANSWERS = Path(__file__).parents[1] / "data" / "example" / "answers.json"
_MARKS = {"ok": "ok   ", "wrong": "WRONG", "skipped": "-    "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `doctor`."""
    parser.add_argument(
        "--budget",
        type=integer(1),
        default=90,
        metavar="SECONDS",
        help="start no check after this time (default: %(default)s)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="write what was found here, after every check, as <kind of device>.json"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of lines")
    backend.add_compilation_flags(parser.add_argument_group("compiled programs"))


def run(args: argparse.Namespace) -> int:
    """Runs `bicache doctor`; returns the exit status."""
    from bicache_jax.loading import load_model
    from bicache_jax.measure import doctor

    backend.start_compilation_cache(args)
    found: list[Check] = []
    checks: Iterable[Check] = doctor.checks(lambda: load_model("example", dtype="float32"), ANSWERS, args.budget)
    part = ""
    for check in checks:
        found.append(check)
        if args.output is not None:
            doctor.write(found, args.output)
        if args.json:
            continue
        if check.part != part:
            part = check.part
            print(f"{part}")
        print(f"  {_MARKS[check.status]} {check.name}: {check.detail}", flush=True)
    record = doctor.report(found)
    wrong = [check.name for check in found if check.status == "wrong"]
    if args.json:
        print(json.dumps(record))
    elif wrong:
        print(f"{len(wrong)} of {len(found)} checks are wrong:", *wrong, sep="\n  ")
    else:
        print(f"all is well: {len(found)} checks")
    return EXIT_WRONG if wrong else 0
