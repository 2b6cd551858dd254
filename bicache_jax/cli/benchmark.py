"""`bicache benchmark`: speed of policies side by side, and how near the limit they come."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from typing import Any

from bicache_jax.cli import backend
from bicache_jax.cli.options import (
    DTYPE_HELP,
    add_cache_dtype_flag,
    add_checkpoint_flags,
    auto_or_integer,
    boundary,
    flag_named,
    fraction,
    from_flags,
    integer,
    integers,
    listed,
)
from bicache_jax.core.config import DTYPES, REFRESH_INTERVAL
from bicache_jax.core.table import Table
from bicache_jax.core.types import BicacheError

HELP = "measure the speed of policies, and how near the limit it is"
DESCRIPTION = """\
Runs the same synthetic requests under several policies, in turns in one process, and prints for each the speed, its
ratio to no cache, the ratio that counted operations allow at most, and the share of the matmul peak that is used.
Flags that take a LIST make a grid."""
EPILOG = """\
examples:
  bicache benchmark --random small --policies none,bicache --prefix 768 --suffix 256 --rows 4 --refresh-interval 16 \\
      --dtype float32 --json
  bicache benchmark --random small --mixed --policies none,bicache+dual --prefix 256 --rows 8
  bicache benchmark --model ./LLaDA-8B-Instruct --prefix 512,1024 --suffix 256 --rows 1,8,32 --plot speed.png

columns:
  limit   ratio to no cache of the published algorithm's work, by exact counts of operations (on accelerators by the
          larger of operations / peak and bytes / bandwidth); the encoding is spread over the rows of a prefix
  share   measured ratio / limit; above 1 where work is saved that the published algorithm does
  mfu     operations executed / (time x highest speed of a large matrix product measured in this process); tokens and
          rows of padding count as nothing executed
  memory  of the decode program, parameters included, as the compiler counts it
  kept    seconds to the first token of a call that finds its prefixes encoded by an earlier one
  own     with --mixed: share of the row-steps (places of the batches x passes) that were some request's own; in batches
          whose free places waiting rows take, and in batches that wait for their slowest row; ratio: of their times;
          differ: responses that joining changed
  cold, warm  with --restart: seconds from the start of `generate` in a process of its own to the first token, with no
          compiled program kept and with all of them"""


POLICIES = ("none", "naive", "bicache")
"""Policies to compare where none are named and attention is full."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `benchmark`."""
    what = parser.add_argument_group("model")
    model = what.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="M", help="folder, hub id, or 'example' (see generate)")
    model.add_argument(
        "--random", metavar="SHAPE", help="random, such as llada_8b, sdar_4b, small, small_blocks or tiny"
    )
    what.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)
    add_checkpoint_flags(what)

    grid = parser.add_argument_group("settings")
    grid.add_argument(
        "--policies",
        type=listed,
        metavar="LIST",
        help="none, naive, bicache, each also with +prefix or +dual; none and exact where attention is block-causal"
        " (default: none,naive,bicache, or these two)",
    )
    lengths = grid.add_mutually_exclusive_group()
    lengths.add_argument("--prefix", type=integers(0), metavar="LIST", help="prefix tokens (default: 768)")
    lengths.add_argument("--ratio", type=integers(0, 99), metavar="LIST", help="prefix tokens in percent of all")
    grid.add_argument("--suffix", type=integers(1), default=(256,), metavar="LIST", help="suffix tokens (default: 256)")
    grid.add_argument("--rows", type=integers(1), default=(4,), metavar="LIST", help="rows of the batch (default: 4)")
    grid.add_argument("--prefixes", type=integers(1), default=(1,), metavar="LIST", help="that they share (default: 1)")
    grid.add_argument(
        "--refresh-interval",
        type=_intervals,
        default=(REFRESH_INTERVAL,),
        metavar="LIST",
        help=f"N; auto: as in generate, by the block cache (default: {REFRESH_INTERVAL}, so that policies differ in"
        " their caches alone)",
    )
    grid.add_argument("--boundary", type=_boundaries, default=("auto",), metavar="LIST", help="b (default: auto)")
    add_cache_dtype_flag(grid, several=True)
    grid.add_argument("--gen-length", type=integer(1), metavar="N", help="(default: half of the suffix)")
    grid.add_argument(
        "--steps", type=integer(1), metavar="N", help="(default: one refresh interval, at most gen-length)"
    )
    grid.add_argument(
        "--block-length",
        type=integer(1),
        metavar="N",
        help="(default: gen-length; 32 where a policy has a block cache)",
    )
    backend.add_attention_flag(grid)

    mixed = parser.add_argument_group("mixed work")
    mixed.add_argument(
        "--mixed",
        action="store_true",
        help="instead: requests of many response lengths (32-256 tokens, blocks of 32) that stop early (with random"
        " weights: one token in a hundred ends a response), in batches of --rows that waiting rows join, against"
        " batches that wait for their slowest row",
    )
    mixed.add_argument("--requests", type=integer(1), metavar="N", help="(default: 12 for each row of a batch)")
    mixed.add_argument(
        "--threshold",
        type=fraction,
        metavar="P",
        help="confidence that unmasks a token (default: a token a step)",
    )

    running = parser.add_argument_group("running")
    running.add_argument(
        "--baseline",
        type=listed,
        default=(),
        metavar="LIST",
        help="torch: the same weights in PyTorch; torch+compile: through torch.compile",
    )
    running.add_argument("--repeats", type=integer(1), default=5, metavar="N", help="most turns (default: %(default)s)")
    running.add_argument(
        "--seconds",
        type=integer(1),
        default=75,
        metavar="S",
        help="for all turns after the first (default: %(default)s)",
    )
    running.add_argument(
        "--restart", action="store_true", help="also time a fresh process, cold and with its programs kept"
    )
    running.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    running.add_argument("--plot", metavar="FILE", help="write a PNG: speed over the settings, with the limit")
    running.add_argument("--quiet", action="store_true", help="no progress bar")
    backend.add_compilation_flags(running)


def _boundaries(text: str) -> tuple[int | str, ...]:
    return tuple(boundary(part) for part in listed(text))


def _intervals(text: str) -> tuple[int | str, ...]:
    return tuple(auto_or_integer(1)(part) for part in listed(text))


def run(args: argparse.Namespace) -> int:
    """Runs `bicache benchmark`; returns the exit status."""
    import jax
    from tqdm import tqdm

    from bicache_jax.measure import benchmark
    from bicache_jax.measure.policies import in_forms
    from bicache_jax.measure.torch_baseline import TorchRunner

    if args.restart and args.model is None:
        raise BicacheError("--restart needs --model: random weights are nothing that a fresh process could load")
    load = [benchmark.load_average()]
    if not args.mixed and (args.requests is not None or args.threshold is not None):
        raise BicacheError("--requests and --threshold go with --mixed")
    model = backend.load(args) if args.model is not None else backend.random(args)
    causal = model.config.block_causal
    if args.policies is None:
        args.policies = ("none", "exact") if causal else POLICIES
    args.policies = in_forms(args.policies, ("none",), args.cache_dtype)
    if causal and args.block_length is None:
        args.block_length = model.config.block_length
    if args.mixed:
        return _run_mixed(args, model, load)
    cases = _cases(args)
    with flag_named("suffix"), flag_named("prefix"):
        runners: list[Any] = [
            TorchRunner(model, case)
            if case.policy in args.baseline
            else benchmark.EngineRunner(model, case, args.attention)
            for case in cases
        ]
    with ExitStack() as stack:
        total = len(cases) * (1 + args.repeats)
        bar = stack.enter_context(
            tqdm(total=total, unit="run", disable=args.quiet or not sys.stderr.isatty(), leave=False)
        )
        bandwidth = benchmark.memory_bandwidth()
        dtype = model.dtype
        times, firsts, peak = benchmark.measure(
            runners,
            peak=benchmark.matmul_peak(dtype),
            repeats=args.repeats,
            seconds=args.seconds,
            progress=lambda: None if bar.update() else None,
        )
        results = benchmark.report(
            model.config, cases, runners, times, firsts, peak=peak, bandwidth=bandwidth, itemsize=dtype.itemsize
        )
    record = {
        "model": args.model or f"random {args.random}",
        "device": benchmark.device_name(),
        "dtype": dtype.name,
        "jax": jax.__version__,
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "bandwidth_gb_s": None if bandwidth == float("inf") else round(bandwidth / 1e9, 1),
        "turns": len(times),
        "load_average": [*load, benchmark.load_average()],
        "results": results,
    }
    if args.restart:
        from bicache_jax.measure.restart import measure_restart

        flags = ["--model", args.model, "--dtype", args.dtype]
        flags += [] if args.mask_id is None else ["--mask-id", f"{args.mask_id}"]
        flags += [] if args.quantize is None else ["--quantize", args.quantize]
        flags += ["--block-causal"] * args.block_causal + ["--right-shift-logits"] * args.right_shift_logits
        for case, result in zip(cases, results, strict=True):
            if case.policy not in args.baseline:
                result.update(measure_restart(model.config, case, flags))
    if args.plot:
        from bicache_jax.measure.plots import DPI, speed_over_settings

        speed_over_settings(record).savefig(args.plot, dpi=DPI)
    print(json.dumps(record) if args.json else table(record))
    return 0


def _run_mixed(args: argparse.Namespace, model: Any, load: list[Any]) -> int:
    """Runs `bicache benchmark --mixed`."""
    import jax
    from tqdm import tqdm

    from bicache_jax.measure import benchmark
    from bicache_jax.measure.mixed import ending, measure_mixed, mixed_requests

    lists = {name: getattr(args, name) for name in ("rows", "prefixes", "refresh_interval", "boundary")}
    lists["prefix"] = args.prefix or (768,)
    for name, values in lists.items():
        if len(values) != 1:
            raise BicacheError(f"--{name.replace('_', '-')}: one value with --mixed, got {len(values)}")
    (rows,), (prefixes,), (interval,), (boundary,), (prefix,) = lists.values()
    model = ending(model) if args.model is None else model
    with flag_named("prefix"):
        requests = mixed_requests(
            model.config,
            count=args.requests or 12 * rows,
            prefix=prefix,
            prefixes=prefixes,
            threshold=args.threshold,
        )
    total = 2 * len(args.policies) * (1 + args.repeats)
    with tqdm(total=total, unit="run", disable=args.quiet or not sys.stderr.isatty(), leave=False) as bar:
        results = measure_mixed(
            model,
            args.policies,
            requests,
            rows=rows,
            repeats=args.repeats,
            seconds=args.seconds,
            refresh_interval=interval,
            boundary=boundary,
            attention=args.attention,
            progress=lambda: None if bar.update() else None,
        )
    record = {
        "model": args.model or f"random {args.random}",
        "device": benchmark.device_name(),
        "dtype": model.dtype.name,
        "jax": jax.__version__,
        "prefix": prefix,
        "threshold": args.threshold,
        "load_average": [*load, benchmark.load_average()],
        "results": results,
    }
    print(json.dumps(record) if args.json else mixed_table(record))
    return 0


def _cases(args: argparse.Namespace) -> list[Any]:
    """The cases of the flags."""
    from bicache_jax.measure.grid import Grid
    from bicache_jax.measure.torch_baseline import BASELINES

    for name in args.baseline:
        if name not in BASELINES:
            raise BicacheError(f"--baseline {name!r}: the baselines are {', '.join(BASELINES)}")
    prefixes = args.ratio if args.ratio is not None else args.prefix if args.prefix is not None else (768,)
    grid = Grid(
        policies=args.policies or POLICIES,
        baselines=args.baseline,
        prefixes=prefixes,
        by_ratio=args.ratio is not None,
        suffixes=args.suffix,
        rows=args.rows,
        groups=args.prefixes,
        refresh_intervals=args.refresh_interval,
        boundaries=args.boundary,
        gen_length=args.gen_length,
        steps=args.steps,
        block_length=args.block_length,
    )
    lengths = {"gen_length": args.gen_length, "steps": args.steps, "block_length": args.block_length}
    with flag_named("prefixes"):
        return from_flags(lambda **_: grid.cases(), **lengths)


def table(record: dict[str, Any]) -> str:
    """Results for people, in Markdown."""
    above = (
        f"{record['model']}, {record['dtype']}, {record['device']}, jax {record['jax']}; "
        f"matmul peak {record['matmul_peak_gflops']:.0f} GFLOP/s; medians of {record['turns']} turns; "
        f"load average {', '.join(str(load) for load in record['load_average'])}"
    )
    heads = [*"policy P U r rows G N b steps tokens/s".split(), "ratio (spread)", *"limit share mfu".split()]
    heads += ["first token", "kept", *"memory cache compile dispatches".split()]
    restarted = any("cold_start_s" in result for result in record["results"])
    heads += ["cold", "warm"] if restarted else []
    rows = []

    def number(value: Any, form: str, unit: str = "") -> str:
        return "" if value is None else f"{value:{form}}{unit}"

    for result in record["results"]:
        spread = result["ratio_spread"]
        ratio = number(result["ratio_to_none"], ".2f")
        cells = [
            result["policy"],
            *(str(result[name]) for name in ("prefix", "suffix", "ratio", "rows", "prefixes", "refresh_interval")),
            number(result["boundary"], "d"),
            str(result["steps"]),
            number(result["tokens_per_s"], ".1f"),
            f"{ratio} ({spread[0]:.2f}-{spread[1]:.2f})" if spread else "",
            number(result["limit"], ".2f"),
            number(result["limit_share"], ".2f"),
            number(result["mfu"], ".2f"),
            number(result["first_token_s"], ".3f", " s"),
            number(result.get("first_token_kept_s"), ".3f", " s"),
            number(result["memory_bytes"] and result["memory_bytes"] / 2**20, ".0f", " MiB"),
            number(result["cache_bytes"] and result["cache_bytes"] / 2**20, ".1f", " MiB"),
            number(result["compile_s"], ".1f", " s"),
            number(result["dispatches"], "d"),
        ]
        if restarted:
            cells += [number(result.get(name), ".1f", " s") for name in ("cold_start_s", "warm_start_s")]
        rows.append(cells)
    return Table(heads, rows, above=(above,)).markdown()


def mixed_table(record: dict[str, Any]) -> str:
    """Results of mixed work for people, in Markdown."""
    above = (
        f"{record['model']}, {record['dtype']}, {record['device']}, jax {record['jax']}; P {record['prefix']}; "
        f"load average {', '.join(str(load) for load in record['load_average'])}"
    )
    heads = ("policy", "requests", "rows", "passes a response", "own", "own, waiting", "responses/s", "ratio (spread)")
    rows = []
    for result in record["results"]:
        low, mean, high = result["passes"]
        spread = result["ratio_spread"]
        speeds = (f"{result['own']:.3f}", f"{result['own_waiting']:.3f}", f"{result['responses_per_s']:.2f}")
        ratio = f"{result['ratio']:.2f} ({spread[0]:.2f}-{spread[1]:.2f})"
        counts = (f"{result['requests']}", f"{result['rows']}", f"{low}-{high}, mean {mean}")
        rows.append((result["policy"], *counts, *speeds, ratio, str(result["differ"])))
    return Table((*heads, "differ"), rows, above=(above,)).markdown()
