"""Times prefix attention over a grid of shapes, and compares it with library attention and the device's roofline.

    python scripts/benchmark_kernels.py --rows 1,8,32 --prefixes 1,4 --prefix 256,1024,4096 --queries 32,384

Rows share prefixes evenly. `gathered` is `jax.nn.dot_product_attention` on keys and values that are gathered per row
and joined with the suffix; the time includes the gathering, which every call would need. `roofline` is the larger of
operations / peak and bytes / bandwidth, with a shared prefix read once. Peak and bandwidth are measured in the same
process, so a share above 1 means that one of them was measured too low. The script runs on any device, but the results
are only meaningful on accelerators: on CPUs `auto` is plain JAX, and the roofline only counts operations.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax.core.config import ATTENTION
from bicache_jax.kernels import prefix_attention
from bicache_jax.measure.benchmark import matmul_peak, memory_bandwidth
from bicache_jax.measure.kernel_times import Shape, gathered, seconds, with_inputs


def grid(args: argparse.Namespace) -> Iterator[tuple[int, int, int, int]]:
    """(rows, prefixes, P, T) with no more prefixes than rows."""
    for rows, prefixes, prefix, queries in itertools.product(args.rows, args.prefixes, args.prefix, args.queries):
        if prefixes <= rows:
            yield rows, prefixes, prefix, queries


def measure(args: argparse.Namespace, case: tuple[int, int, int, int], peak: float, bandwidth: float) -> dict[str, Any]:
    """One row of the table."""
    rows, prefixes, prefix, queries = case
    sizes = (args.heads, args.kv_heads, args.head_dim, prefix, queries, args.suffix or queries)
    shape = Shape("", rows, prefixes, *sizes, dtype=args.dtype)
    inputs, flops, moved = shape.inputs(), shape.flops, shape.nbytes
    ours = with_inputs(functools.partial(prefix_attention, implementation=args.attention))
    taken, library = seconds(ours, inputs, args.seconds), seconds(gathered, inputs, args.seconds)
    return {
        "rows": rows,
        "prefixes": prefixes,
        "P": prefix,
        "T": queries,
        "S": shape.suffix,
        "ms": taken * 1e3,
        "gflop_s": flops / taken / 1e9,
        "gb_s": moved / taken / 1e9,
        "gathered_ms": library * 1e3,
        "speedup": library / taken,
        "roofline": max(flops / peak, moved / bandwidth) / taken,
        "bound": "arithmetic" if flops / peak > moved / bandwidth else "memory",
    }


def crossover(table: list[dict[str, Any]]) -> list[str]:
    """For each (rows, prefixes, T): the smallest P from which prefix attention is faster."""
    lines = []
    for key, group in itertools.groupby(
        sorted(table, key=lambda row: (row["rows"], row["prefixes"], row["T"], row["P"])),
        key=lambda row: (row["rows"], row["prefixes"], row["T"]),
    ):
        found = list(group)
        slower = [row["P"] for row in found if row["speedup"] < 1]
        faster = [row["P"] for row in found if row["P"] > max(slower, default=-1)]
        where = f"from P = {min(faster)} on" if faster else f"nowhere up to P = {max(slower)}"
        lines.append(f"rows {key[0]}, prefixes {key[1]}, T {key[2]}: faster than gathered {where}")
    return lines


def device_name() -> str:
    """Name of the device that is measured."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    models = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{models[0].split(':')[1].strip() if models else platform.processor()}, {os.cpu_count()} cores"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes JSON if requested."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description="Time prefix attention over a grid of shapes.")
    parser.add_argument("--rows", type=numbers, default=[1, 8], metavar="LIST", help="(default: 1,8)")
    parser.add_argument("--prefixes", type=numbers, default=[1], metavar="LIST", help="(default: 1)")
    parser.add_argument("--prefix", type=numbers, default=[256, 1024], metavar="LIST", help="P (default: 256,1024)")
    parser.add_argument("--queries", type=numbers, default=[32, 384], metavar="LIST", help="T (default: 32,384)")
    parser.add_argument("--suffix", type=int, metavar="S", help="suffix keys (default: as many as queries)")
    parser.add_argument("--heads", type=int, default=32, metavar="N", help="query heads (default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=32, metavar="K", help="KV heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, metavar="H", help="head size (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="(default: %(default)s)")
    parser.add_argument("--attention", default="auto", choices=ATTENTION, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, metavar="S", help="of a run (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the table here")
    args = parser.parse_args(argv)
    if args.heads % args.kv_heads:
        parser.error(f"--kv-heads {args.kv_heads} must divide --heads {args.heads}")
    cases = list(grid(args))
    if not cases:
        parser.error("--prefixes must have a number that is at most the largest of --rows")

    product, bandwidth, name = matmul_peak(jnp.dtype(args.dtype)), memory_bandwidth(), device_name()
    peak = max(product() for _ in range(3))
    speeds = f"{peak / 1e9:.0f} GFLOP/s" + (f", {bandwidth / 1e9:.0f} GB/s" if math.isfinite(bandwidth) else "")
    print(f"{name}: {speeds} measured; {args.dtype}, {args.attention}")
    print("  rows prefixes      P      T        ms  GFLOP/s    GB/s  gathered ms  speed-up  roofline  bound")
    table = []
    for case in cases:
        row = measure(args, case, peak, bandwidth)
        table.append(row)
        print(
            f"{row['rows']:6} {row['prefixes']:8} {row['P']:6} {row['T']:6} {row['ms']:9.3f} {row['gflop_s']:8.0f}"
            f" {row['gb_s']:7.1f} {row['gathered_ms']:12.3f} {row['speedup']:8.2f}x {row['roofline']:9.0%}"
            f"  {row['bound']}",
            flush=True,
        )
    print("\n".join(crossover(table)))
    if args.json:
        facts = {
            "device": name,
            "peak": peak,
            "bandwidth": bandwidth if math.isfinite(bandwidth) else None,
            "jax": jax.__version__,
        }
        chosen = {field: getattr(args, field) for field in ("dtype", "attention", "heads", "kv_heads", "head_dim")}
        Path(args.json).write_text(json.dumps(facts | chosen | {"table": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
