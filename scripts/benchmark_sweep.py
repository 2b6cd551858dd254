"""Measures how tokens/s and memory depend on rows, prefix length, number of prefixes and N, with the limit.

One setting varies at a time; the others keep their base value. Writes `benchmark_sweep.json` and one plot per setting
into the output folder:

    python scripts/benchmark_sweep.py --random small --output scripts/results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from bicache_jax.cli import backend
from bicache_jax.cli.options import Parser, add_checkpoint_flags, boundary, integer, integers, listed
from bicache_jax.core.config import SamplingConfig
from bicache_jax.core.types import BicacheError
from bicache_jax.measure import benchmark
from bicache_jax.measure.plots import DPI, growth

AXES = ("prefix", "rows", "prefixes", "refresh_interval")


def _flags() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="M", help="folder, hub id, or 'example'")
    model.add_argument("--random", metavar="SHAPE", help="random: llada_8b, dream_7b, qwen3_0_6b, small")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add_checkpoint_flags(parser)
    parser.add_argument("--policies", type=listed, default=("none", "bicache"), metavar="LIST")
    parser.add_argument("--prefix", type=integers(0), default=(16, 64, 128, 256, 512, 1024), metavar="LIST")
    parser.add_argument("--rows", type=integers(1), default=(1, 2, 4, 8), metavar="LIST")
    parser.add_argument("--prefixes", type=integers(1), default=(1, 2, 4), metavar="LIST")
    parser.add_argument("--refresh-interval", type=integers(1), default=(1, 2, 4, 8, 16), metavar="LIST")
    parser.add_argument("--suffix", type=integer(2), default=128, metavar="U", help="half of it is the response")
    parser.add_argument(
        "--base", type=integers(1), default=(512, 4, 1, 16), metavar="LIST", help="base P, rows, prefixes and N"
    )
    parser.add_argument("--boundary", type=boundary, default="auto", help="b (default: auto, the model's table)")
    parser.add_argument("--steps", type=integer(1), default=16, metavar="N")
    parser.add_argument("--repeats", type=integer(1), default=5, metavar="N", help="turns of each setting")
    parser.add_argument("--seconds", type=integer(1), default=120, metavar="S", help="for the turns of one setting")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    backend.add_compilation_flags(parser.add_argument_group("compiled programs"))
    return parser


def _sweep(args: argparse.Namespace) -> dict[str, Any]:
    model = backend.load(args) if args.model is not None else backend.random(args)
    if len(args.base) != len(AXES):
        raise BicacheError(f"--base needs {len(AXES)} numbers: {', '.join(AXES)}")
    base = dict(zip(AXES, args.base, strict=True))
    sampling = SamplingConfig(gen_length=args.suffix // 2, steps=min(args.steps, args.suffix // 2))
    dtype = model.dtype
    peak, bandwidth = benchmark.matmul_peak(dtype), benchmark.memory_bandwidth()
    sweeps: dict[str, Any] = {}
    load = [benchmark.load_average()]
    for axis in AXES:
        cases: dict[benchmark.Case, None] = {}
        for value in getattr(args, axis):
            for policy in args.policies:
                # `none` does not use the refresh interval, so one case is enough.
                interval = {"refresh_interval": base["refresh_interval"]} if policy == "none" else {}
                here = {**base, axis: value, **interval}
                cases[
                    benchmark.Case(policy=policy, suffix=args.suffix, boundary=args.boundary, sampling=sampling, **here)
                ] = None
        runners = [benchmark.EngineRunner(model, case) for case in cases]
        times, firsts, best = benchmark.measure(runners, peak=peak, repeats=args.repeats, seconds=args.seconds)
        sweeps[axis] = benchmark.report(
            model.config, list(cases), runners, times, firsts, peak=best, bandwidth=bandwidth, itemsize=dtype.itemsize
        )
        load.append(benchmark.load_average())
        print(f"{axis}: {len(cases)} settings, {len(times)} turns", file=sys.stderr, flush=True)
    return {
        "model": args.model or f"random {args.random}",
        "device": benchmark.device_name(),
        "dtype": dtype.name,
        "jax": jax.__version__,
        "load_average": load,
        "base": {**base, "suffix": args.suffix},
        "sampling": dataclasses.asdict(sampling),
        "sweeps": sweeps,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; returns the exit status."""
    try:
        args = _flags().parse_args(argv)
        args.output.mkdir(parents=True, exist_ok=True)
        record = _sweep(args)
    except BicacheError as error:
        print(f"benchmark_sweep: {error}", file=sys.stderr)
        return 2
    (args.output / "benchmark_sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    for axis in AXES:
        growth(record, axis).savefig(args.output / f"benchmark_{axis}.png", dpi=DPI)
    return 0


if __name__ == "__main__":
    sys.exit(main())
