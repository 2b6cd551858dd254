"""`bicache convert`: a checkpoint in the format that loads fastest onto many devices, or back."""

from __future__ import annotations

import argparse
import sys
import time

from bicache_jax.cli.options import DTYPE_HELP, add_quantize_flag, add_weights_flag, integer
from bicache_jax.core.config import DTYPES

HELP = "convert a checkpoint to an orbax folder, or back"
DESCRIPTION = """\
Writes a model as an orbax folder: parameters stacked as they run, in small chunks that each process reads for its own
devices only, with a checksum for each, which loading verifies. Config, tokenizer files and boundary table come along,
and the fingerprint stays, so a boundary table remains the model's own. Every --model takes the folder."""
EPILOG = """\
The model is loaded on one device for this, so the machine's memory must hold it once. Nothing is written but a whole
folder: it appears under its name when it is complete and has been read back.

examples:
  bicache convert --model GSAI-ML/LLaDA-8B-Instruct --dtype bfloat16 --output LLaDA-8B-orbax
  bicache convert --model LLaDA-8B-orbax --to safetensors --output LLaDA-8B
  bicache convert --model GSAI-ML/LLaDA-8B-Instruct --quantize w8a8 --to safetensors --output LLaDA-8B-w8a8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `convert`."""
    parser.add_argument("--model", required=True, metavar="M", help="folder, hub id, or 'example' (see generate)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write; must not exist, or be empty")
    parser.add_argument(
        "--to", choices=("orbax", "safetensors"), default="orbax", help="format to write (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)
    parser.add_argument("--mask-id", type=integer(0), metavar="ID", help="mask token, where no file names it")
    add_quantize_flag(parser)
    add_weights_flag(parser)
    parser.add_argument("--quiet", action="store_true", help="no closing line")


def run(args: argparse.Namespace) -> int:
    """Runs `bicache convert`; returns the exit status."""
    from bicache_jax.convert import convert

    started = time.perf_counter()
    size = convert(
        args.model,
        args.output,
        to=args.to,
        dtype=args.dtype,
        mask_id=args.mask_id,
        quantize=args.quantize,
        check_weights=args.check_weights,
    )
    if not args.quiet:
        seconds = time.perf_counter() - started
        print(
            f"bicache: {size / 2**20:.1f} MiB of parameters written to {args.output} in {seconds:.1f} s",
            file=sys.stderr,
        )
    return 0
