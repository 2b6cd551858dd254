"""`bicache plan`: what `bicache generate` would do, without doing it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from bicache_jax.cli.generate import add_running_arguments, configurations, show_plan
from bicache_jax.cli.options import Parser, flag_named, fraction, integer, refuse_flags, row_count
from bicache_jax.core.types import BicacheError

HELP = "show what generate would do with a file of requests, or what a model would need on a device"
DESCRIPTION = """\
With --model and --input: reads requests and loads the model as 'bicache generate' with the same flags does, and prints
how it would run them: which requests share a prefix and a batch, their boundaries, the shapes in buckets, the memory of
a device, and how much faster than no cache it can be. Nothing is generated.

With --config and --device: says what equal rows of a published shape need on devices that are not here, and how many of
them fit, by the same planner, from shapes alone. No checkpoint, no compiler. Requests an hour are what published peaks
allow at most: each pass takes the larger of arithmetic and memory traffic. 'bicache aot' asks a TPU's compiler."""
EPILOG = """\
exit status: 0 all is well, 1 the rows do not fit the device, 2 bad flags or an unreadable file, 3 some requests are
errors.

examples:
  bicache plan --model example --input examples/requests.jsonl
  bicache plan --model ./LLaDA-8B-Instruct --input requests.jsonl --gen-length 256 --mesh data=4,model=2 --json
  bicache plan --config llada_8b --device t4 --quantize w8 --prefix 1024 --suffix 512 --gen-length 256
  bicache plan --config llada_8b --device v5e:2x4 --mesh data=8 --quantize w8a8 --block-cache dual --json"""

EXIT_NO_FIT = 1

_SHAPE = ("config", "device", "prefix", "suffix", "rows", "per_prefix", "memory_share")
# They need a checkpoint, or make the work depend on what is written.
_NOT_OF_SHAPES = (
    "model input mask_id block_causal right_shift_logits boundary_table batch_size prefix_cache_dir threshold factor"
    " entropy_bound editing_threshold cfg_scale"
).split()


def add_arguments(parser: Parser) -> None:
    """Adds the flags of `plan`."""
    files = parser.add_argument_group("input and output")
    files.add_argument("--input", metavar="FILE", help="requests, JSON lines; - reads standard input")
    files.add_argument("--json", action="store_true", help="print one JSON object instead of a table; sizes in bytes")
    shape = parser.add_argument_group("without a checkpoint and without the device")
    shape.add_argument("--config", metavar="SHAPE", help="a published shape, such as llada_8b, dream_7b, sdar_8b")
    shape.add_argument(
        "--device",
        metavar="D",
        help="t4, l4, a100, a100_80gb, h100, h200, v5e, v5p, v6e, tpu7x; several: h100-8, v5e-8, v5e:2x4",
    )
    shape.add_argument("--prefix", type=integer(0), metavar="P", help="prefix tokens (default: 1024)")
    shape.add_argument("--suffix", type=integer(1), metavar="U", help="suffix tokens, response included (default: 512)")
    shape.add_argument(
        "--rows",
        type=row_count,
        metavar="B",
        help="rows of a data shard; max: as many as fit; auto: as many as generate takes without --batch-size (default:"
        " max)",
    )
    shape.add_argument("--per-prefix", type=integer(1), metavar="n", help="rows that share a prefix (default: 16)")
    shape.add_argument(
        "--memory-share",
        type=fraction,
        metavar="X",
        help="what XLA_PYTHON_CLIENT_MEM_FRACTION will be (default: 0.75 on GPUs, as in JAX; 1 on TPUs)",
    )
    add_running_arguments(parser, required=False)


def run(args: argparse.Namespace) -> int:
    """Runs `bicache plan`; returns the exit status."""
    given = {name for name in _SHAPE if getattr(args, name) is not None}
    if not given:
        for flag in ("model", "input"):
            if getattr(args, flag) is None:
                raise BicacheError(f"plan needs --{flag}, or --config and --device (see bicache plan --help)")
        return show_plan(args, as_json=args.json)
    for flag in ("config", "device"):
        if flag not in given:
            raise BicacheError(f"--{min(given).replace('_', '-')} needs --{flag}, too: a plan from shapes alone")
    return _show_capacity(args, given)


def _show_capacity(args: argparse.Namespace, given: set[str]) -> int:
    from bicache_jax.serving.capacity import Shape, capacity, describe
    from bicache_jax.wiring import device

    refuse_flags(args, _NOT_OF_SHAPES, add_arguments, "has no place in a plan from shapes alone (--config)")
    cache, sampling = configurations(args)
    with flag_named("device"):
        chip, _ = device(args.device)
    fields: dict[str, Any] = {name: getattr(args, name) for name in ("prefix", "suffix", "per_prefix") if name in given}
    shape = Shape(
        args.config,
        **fields,
        rows=args.rows or "max",
        policy=cache.policy,
        boundary=None if cache.boundary == "auto" else cache.boundary,
        refresh_interval=cache.refresh_interval,
        gen_length=sampling.gen_length,
        block_length=sampling.block_length,
        steps=sampling.num_steps if args.steps or args.steps_per_block else None,
        block_cache=cache.block_cache,
        dtype=chip.dtype if args.dtype == "auto" else args.dtype,
        quantize=args.quantize or "none",
        cache_dtype=cache.cache_dtype,
    )
    with flag_named("mesh"):
        found = capacity(shape, args.device, args.mesh or "", share=args.memory_share)
    print(json.dumps(found, indent=1) if args.json else describe(found))
    return 0 if found["fits"] else EXIT_NO_FIT
