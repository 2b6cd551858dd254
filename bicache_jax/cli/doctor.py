"""`bicache doctor`: is everything right on this machine?"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bicache_jax.cli import backend
from bicache_jax.cli.options import integer
from bicache_jax.core.types import BicacheError

if TYPE_CHECKING:
    from bicache_jax.measure.doctor import Check

HELP = "check that everything is right on the device that is here, and how fast it is"
DESCRIPTION = """\
Prints versions, devices and which attention serves here; holds every implementation of prefix attention that runs here
to float64; compares the bundled model's answers with recorded ones; and measures the peaks of matrix products and
memory. Kernels of other platforms are run in Pallas's interpreter on a CPU. No network, no test suite.

--full also times every way to compute prefix attention, and whole runs with random weights (LLaDA-8B's and Dream-7B's
shapes where they fit; tiny ones on a CPU), the most important first. What was measured is kept after every step."""
EPILOG = """\
exit status: 0 all is well, 1 something is wrong and named, 2 it cannot run.

examples:
  bicache doctor
  bicache doctor --output devices    # devices/<kind of device>.json, to send along with a question
  bicache doctor --full --budget 420 --output devices --save-tuning"""

EXIT_WRONG = 1
ANSWERS = Path(__file__).parents[1] / "data" / "example" / "answers.json"
_MARKS = {"ok": "ok   ", "wrong": "WRONG", "skipped": "-    "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `doctor`."""
    parser.add_argument(
        "--budget",
        type=integer(1),
        metavar="SECONDS",
        help="start no check after this time (default: 90, with --full 400)",
    )
    parser.add_argument("--full", action="store_true", help="also measure: kernels, and whole runs")
    parser.add_argument(
        "--save-tuning",
        action="store_true",
        help="with --full: keep the fastest block sizes for this kind of device, in bicache-jax/tuning of the user's"
        " cache folder ($BICACHE_TUNING names another)",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="write what was found here, after every check, as <kind of device>.json"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of lines")
    backend.add_compilation_flags(parser.add_argument_group("compiled programs"))


def run(args: argparse.Namespace) -> int:
    """Runs `bicache doctor`; returns the exit status."""
    from bicache_jax.loading import load_model, random_model
    from bicache_jax.measure import doctor, doctor_full

    if args.save_tuning and not args.full:
        raise BicacheError("--save-tuning needs --full: nothing else is timed")
    backend.start_compilation_cache(args)
    found: list[Check] = []
    clock = doctor.Clock(args.budget or (400 if args.full else 90))
    checks: Iterator[Check] = doctor.checks(lambda: load_model("example", dtype="float32"), ANSWERS, clock)
    if args.full:
        checks = itertools.chain(
            checks,
            doctor_full.measurements(
                lambda name, dtype: random_model(name, dtype=dtype),
                clock,
                doctor_full.scale_here(),
                save_tuning=args.save_tuning,
            ),
        )
    part = ""
    for check in checks:
        found.append(check)
        if args.output is not None:
            doctor.write(found, args.output)
        if args.json:
            continue
        if check.part != part:
            part = check.part
            print(part)
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
