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
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax.core.config import ATTENTION
from bicache_jax.core.numerics import precision
from bicache_jax.kernels import prefix_attention
from bicache_jax.measure.benchmark import matmul_peak, memory_bandwidth

Inputs = tuple[jax.Array, ...]


def gathered(
    q: jax.Array,
    k_prefix: jax.Array,
    v_prefix: jax.Array,
    k_suffix: jax.Array,
    v_suffix: jax.Array,
    index: jax.Array,
    prefix_len: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """The library's attention, with a copy of the prefix for every row."""
    k, v = (jnp.concatenate([p[index], s], axis=2) for p, s in ((k_prefix, k_suffix), (v_prefix, v_suffix)))
    seen = jnp.concatenate([jnp.arange(k_prefix.shape[2]) < prefix_len[index][:, None], valid], axis=1)
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    with jax.default_matmul_precision(precision(q.dtype).name.lower()):
        return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None, None]).swapaxes(1, 2)


def ours(*inputs: jax.Array, implementation: str) -> jax.Array:
    """Prefix attention."""
    *arrays, index, prefix_len, valid = inputs
    return prefix_attention(
        *arrays, prefix_index=index, prefix_len=prefix_len, suffix_valid=valid, implementation=implementation
    )


def seconds(call: Callable[..., jax.Array], inputs: Inputs, least: float) -> float:
    """Shortest time of a call. A run makes several calls inside one program, to exclude the dispatch.

    Args:
        call: the function; its result has the shape of its first input.
        inputs: its inputs.
        least: seconds that a run should take.
    """

    @jax.jit
    def chain(turns: jax.Array, *inputs: jax.Array) -> jax.Array:
        def turn(_: jax.Array, q: jax.Array) -> jax.Array:
            return call(q, *inputs[1:])

        return jax.lax.fori_loop(0, turns, turn, inputs[0])

    def once(turns: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(chain(jnp.asarray(turns), *inputs))
        return time.perf_counter() - started

    once(1)
    turns = max(1, int(least / max(once(1), 1e-6)))
    return min(once(turns) for _ in range(3)) / turns


def grid(args: argparse.Namespace) -> Iterator[tuple[int, int, int, int]]:
    """(rows, prefixes, P, T) with no more prefixes than rows."""
    for rows, prefixes, prefix, queries in itertools.product(args.rows, args.prefixes, args.prefix, args.queries):
        if prefixes <= rows:
            yield rows, prefixes, prefix, queries


def measure(args: argparse.Namespace, case: tuple[int, int, int, int], peak: float, bandwidth: float) -> dict[str, Any]:
    """One row of the table."""
    rows, prefixes, prefix, queries = case
    heads, kv_heads, head_dim = args.heads, args.kv_heads, args.head_dim
    suffix = args.suffix or queries
    dtype = jnp.dtype(args.dtype)
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    inputs = (
        normal(rows, heads, queries, head_dim),
        *(normal(prefixes, kv_heads, prefix, head_dim) for _ in range(2)),
        *(normal(rows, kv_heads, suffix, head_dim) for _ in range(2)),
        jnp.arange(rows, dtype=jnp.int32) * prefixes // rows,
        jnp.full((prefixes,), prefix, jnp.int32),
        jnp.ones((rows, suffix), bool),
    )
    flops = 4 * rows * heads * queries * (prefix + suffix) * head_dim
    moved = 2 * dtype.itemsize * head_dim * (rows * heads * queries + kv_heads * (prefixes * prefix + rows * suffix))
    taken = seconds(functools.partial(ours, implementation=args.attention), inputs, args.seconds)
    library = seconds(gathered, inputs, args.seconds)
    return {
        "rows": rows,
        "prefixes": prefixes,
        "P": prefix,
        "T": queries,
        "S": suffix,
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
