"""Compiles a model's encode and decode programs for a TPU slice that is not here, and says whether they fit.

Needs the TPU compiler (`pip install libtpu`), no TPU. Exit status: 0 it fits, 1 it does not (and the largest number of
rows that should, by the planner, is named), 2 bad arguments.

python scripts/aot_compile.py --config llada_8b --topology v5e:2x4 --mesh data=2,model=4 --prefix 1024 --suffix 512
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax.cli.options import Parser, integer
from bicache_jax.configs import model_shape, names, published_table, topology
from bicache_jax.core.boundary import boundary_at
from bicache_jax.core.buckets import count_bucket, length_bucket
from bicache_jax.core.config import BLOCK_CACHES, CacheConfig, SamplingConfig
from bicache_jax.core.libtpu import expect_no_tpu
from bicache_jax.core.types import BicacheError, Request
from bicache_jax.measure.hlo import Collective, collectives, crossing
from bicache_jax.models import AXES, abstract
from bicache_jax.serving.flops import row_flops
from bicache_jax.serving.grouping import Batch, Row, prefix_ratio
from bicache_jax.serving.memory import Buffers, Footprint, params_bytes
from bicache_jax.serving.placement import Placement
from bicache_jax.serving.plan import Plan, jobs
from bicache_jax.serving.programs import lower_decode, lower_encode
from bicache_jax.sharding import make_mesh, param_shardings
from bicache_jax.wiring import backbone_for

EXIT_NO_FIT, EXIT_FAULT = 1, 2
GIB = 2**30


def row_count(text: str) -> int | None:
    """Value of `--rows`; None for `max`."""
    return None if text == "max" else integer(1)(text)


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(description="Ahead-of-time compile check for TPU slices.")
    parser.add_argument("--config", required=True, help=f"model shape: {', '.join(names('models'))}")
    parser.add_argument("--topology", required=True, help="v5e:2x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1, ...")
    parser.add_argument("--mesh", required=True, metavar="data=D,model=M", help="how the slice's devices are used")
    parser.add_argument("--prefix", type=integer(0), default=1024, metavar="P", help="prefix tokens (%(default)s)")
    parser.add_argument("--suffix", type=integer(1), default=512, metavar="U", help="suffix tokens (%(default)s)")
    parser.add_argument(
        "--rows",
        type=row_count,
        default=8,
        metavar="B",
        help="rows of a data shard; max: as many as should fit (%(default)s)",
    )
    parser.add_argument(
        "--per-prefix", type=integer(1), default=16, metavar="n", help="rows that share a prefix (%(default)s)"
    )
    parser.add_argument("--boundary", type=integer(0), metavar="b", help="boundary (default: the published table's)")
    parser.add_argument("--gen-length", type=integer(1), default=256, metavar="R", help="response (%(default)s)")
    parser.add_argument("--block-length", type=integer(1), default=32, metavar="W", help="block (%(default)s)")
    parser.add_argument("--block-cache", choices=BLOCK_CACHES, default="off", help="block cache (%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="dtype (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def tpu_devices(name: str) -> Sequence[Any]:
    """Devices of a slice, described by the TPU compiler.

    Raises:
        BicacheError: the compiler is not installed, or knows no such slice.
    """
    expect_no_tpu()
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # the compiler's own errors have no common type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BicacheError(f"--topology {name}: the TPU compiler gives none ({reason}); needs libtpu") from None


def make_plan(args: argparse.Namespace, place: Placement, boundary: int, rows: int) -> Plan:
    """A round of equal batches of the shape that is asked for."""
    groups = -(-rows // args.per_prefix)
    response = min(args.gen_length, args.suffix - place.config.shift_logits)  # which need a prompt token before it
    block = min(args.block_length, response)
    sampling = SamplingConfig(response - response % block, None, block)
    rest = tuple(range(args.suffix - sampling.gen_length))
    made = []
    for number in range(rows):
        prefix = (number * groups // rows, *range(1, args.prefix))[: args.prefix]
        made.append(Row(Request(str(number), prefix + rest, args.prefix, sampling), 0, args.prefix, 0, boundary))
    prefixes = tuple(dict.fromkeys(row.prefix for row in made))
    batch = Batch(tuple(made), prefixes, tuple(prefixes.index(row.prefix) for row in made), boundary)
    cache = CacheConfig(policy="bicache" if args.prefix else "none", block_cache=args.block_cache)
    rounds = ((batch,) * place.shards,)
    return Plan(place.config, jnp.dtype(args.dtype), cache, rounds, Buffers.of(rounds, place.config.num_layers))


def by_kind(talk: Sequence[Collective]) -> dict[str, Any]:
    """Number of instructions and bytes of each kind of collective."""
    counts = Counter(one.kind for one in talk)
    return {
        kind: {"instructions": count, "bytes": sum(one.nbytes for one in talk if one.kind == kind)}
        for kind, count in sorted(counts.items())
    }


def compile_one(lower: Any, backbone: Any, params: Any, plan: Plan, place: Placement) -> dict[str, Any]:
    """What the compiler says about a program; `needs` alone where it does not fit."""
    assert place.mesh is not None
    started = time.perf_counter()
    try:
        program = lower(backbone, params, plan, *plan.rounds[0], mesh=place.mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)G of|\(([\d.]+)G\) exceeds", str(error))
        return {"fits": False, "needs_gib": float(used[1] or used[2]) if used else None}
    memory = program.memory_analysis()
    try:
        talk: list[Collective] | None = collectives(program.as_text())
    except jax.errors.JaxRuntimeError:  # jaxlib cannot read every program of a newer TPU compiler
        talk = None
    return {
        "fits": True,
        "arguments_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "compiler_flops": program.cost_analysis().get("flops"),  # loop bodies counted once
        "collectives": None if talk is None else by_kind(talk),
        "collectives_over_data": None if talk is None else len(crossing(talk, place.mesh.devices.shape)),
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles, and compares with the planner.

    Raises:
        BicacheError: model, slice or mesh do not exist.
    """
    if args.config not in names("models"):
        raise BicacheError(f"--config {args.config}: there are {', '.join(names('models'))}")
    config, chip = model_shape(args.config), topology(args.topology)
    mesh = make_mesh(args.mesh, tpu_devices(args.topology))
    place = Placement(config, mesh)
    backbone = backbone_for(place.partition.local, axis=place.axis)
    shapes = abstract(place.partition.config, jnp.dtype(args.dtype))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        param_shardings(AXES, shapes, mesh),
    )
    boundary = args.boundary
    if boundary is None:
        table = published_table(config)
        if table is None:
            raise BicacheError(f"--config {args.config} has no published boundary table: give --boundary")
        boundary = boundary_at(table.table, prefix_ratio(args.prefix, args.prefix + args.suffix))
    buffers = Buffers.between(min(boundary, config.num_layers - 1), boundary, config.num_layers)
    dtype, block_cache = jnp.dtype(args.dtype), args.block_cache != "off"
    footprint = Footprint(place.partition.local, params_bytes(params), buffers, dtype, block_cache, chip.copies)
    most = footprint.most_rows(
        chip.hbm_gib * GIB,
        prefix=length_bucket(args.prefix),
        suffix=length_bucket(args.suffix),
        per_prefix=args.per_prefix,
    )
    asked = args.rows or most
    if not asked:
        raise BicacheError(f"--mesh {args.mesh}: not even one row should fit; cut the model over more devices")
    plan = make_plan(args, place, boundary, asked)
    groups, prefix, rows, suffix = plan.shape(*plan.rounds[0])
    planned = footprint.memory(groups=groups, prefix=prefix, rows=rows, suffix=suffix)
    found = {
        "config": args.config,
        "topology": args.topology,
        "mesh": dict(mesh.shape),
        "hbm_gib": chip.hbm_gib,
        "rows": rows,
        "prefixes": groups,
        "prefix": prefix,
        "suffix": suffix,
        "boundary": boundary,
        "dtype": args.dtype,
        "planned_bytes": planned.total,
        "flops_per_device": sum(row_flops(config, job) for job in jobs(list(plan.batches[0].rows)))
        / mesh.shape["model"],
        "decode": compile_one(lower_decode, backbone, params, plan, place),
        "encode": compile_one(lower_encode, backbone, params, plan, place),
    }
    found["fits"] = bool(found["decode"]["fits"] and found["encode"]["fits"])
    if not found["fits"]:
        found["largest_rows"] = min(most, bucket_below(rows))
    return found


def bucket_below(rows: int) -> int:
    """The next smaller number of rows that a batch may have; 0 below the first."""
    return max((count_bucket(fewer) for fewer in range(1, rows) if count_bucket(fewer) < rows), default=0)


def describe(found: dict[str, Any]) -> str:
    """The findings for people."""
    shape = f"B={found['rows']} G={found['prefixes']} P={found['prefix']} U={found['suffix']} b={found['boundary']}"
    lines = [f"{found['config']} on {found['topology']}, mesh {found['mesh']}, {shape}, {found['dtype']}"]
    for name in ("encode", "decode"):
        part = found[name]
        if not part["fits"]:
            lines.append(f"{name}: does not fit into {found['hbm_gib']} GiB (needs {part['needs_gib']} GiB)")
            continue
        gib = {key: part[f"{key}_bytes"] / GIB for key in ("arguments", "output", "temporaries", "peak")}
        sizes = ", ".join(f"{key} {value:.2f}" for key, value in gib.items())
        talk = ", ".join(f"{one['instructions']} {kind}" for kind, one in (part["collectives"] or {}).items()) or "none"
        lines.append(f"{name}: GiB a device: {sizes}; collectives: {talk}; over data: {part['collectives_over_data']}")
    lines.append(f"planned: {found['planned_bytes'] / GIB:.2f} GiB of {found['hbm_gib']} GiB")
    if not found["fits"]:
        lines.append(f"largest number of rows that should fit: {found['largest_rows']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks and prints; returns the exit status."""
    try:
        args = build_parser().parse_args(argv)
        found = check(args)
    except BicacheError as error:
        print(f"aot_compile: {error}", file=sys.stderr)
        return EXIT_FAULT
    print(json.dumps(found, indent=1) if args.json else describe(found))
    return 0 if found["fits"] else EXIT_NO_FIT


if __name__ == "__main__":
    sys.exit(main())
