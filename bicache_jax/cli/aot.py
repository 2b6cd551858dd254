"""`bicache aot`: does a model fit a TPU slice that is not here?"""

from __future__ import annotations

import argparse
import json

from bicache_jax.cli.options import add_cache_dtype_flag, flag_named, integer, row_count
from bicache_jax.core.config import BLOCK_CACHES, QUANTIZE

HELP = "compile for a TPU slice that is not here, and say whether the programs fit"
DESCRIPTION = """\
Compiles a model's encode and decode programs for a TPU slice, from shapes alone, and says what they need and whether
they fit. Needs the TPU compiler (pip install libtpu), no TPU and no checkpoint."""
EPILOG = """\
exit status: 0 it fits, 1 it does not (and the largest number of rows that should, by the planner, is named), 2 bad
arguments.

examples:
  bicache aot --config llada_8b --topology v5e:2x4 --mesh data=2,model=4 --prefix 1024 --suffix 512
  bicache aot --config dream_7b --topology v6e:1 --mesh data=1,model=1 --rows max --json"""

EXIT_NO_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `aot`."""
    where = parser.add_argument_group("model and slice")
    where.add_argument(
        "--config",
        required=True,
        metavar="SHAPE",
        help="a published shape, such as llada_8b, dream_7b, qwen3_0_6b, sdar_8b, llada2_mini",
    )
    where.add_argument(
        "--topology",
        required=True,
        metavar="SLICE",
        help="generation and sides of the slice: v5e:2x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1, ...; v5e:1 is one chip",
    )
    where.add_argument("--mesh", required=True, metavar="data=D,model=M", help="how the slice's devices are used")
    where.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    where.add_argument(
        "--quantize", choices=QUANTIZE, default="none", help="format of the weights, as in generate (default: none)"
    )
    shape = parser.add_argument_group("batch")
    shape.add_argument(
        "--prefix", type=integer(0), default=1024, metavar="P", help="prefix tokens (default: %(default)s)"
    )
    shape.add_argument(
        "--suffix", type=integer(1), default=512, metavar="U", help="suffix tokens (default: %(default)s)"
    )
    shape.add_argument(
        "--rows",
        type=row_count,
        default=8,
        metavar="B",
        help="rows of a data shard; max: as many as should fit; auto: as many as generate takes (default: %(default)s)",
    )
    shape.add_argument(
        "--per-prefix", type=integer(1), default=16, metavar="n", help="rows that share a prefix (default: %(default)s)"
    )
    shape.add_argument(
        "--boundary",
        type=integer(0),
        metavar="b",
        help="boundary (default: the published table's, else half the layers)",
    )
    shape.add_argument(
        "--gen-length", type=integer(1), default=256, metavar="R", help="response tokens (default: %(default)s)"
    )
    shape.add_argument(
        "--block-length",
        type=integer(1),
        metavar="W",
        help="tokens of a block (default: 32, or the model's own where its attention is block-causal)",
    )
    shape.add_argument(
        "--block-cache", choices=BLOCK_CACHES, default="off", help="as in generate (default: %(default)s)"
    )
    add_cache_dtype_flag(shape)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines for people")


def run(args: argparse.Namespace) -> int:
    """Runs `bicache aot`; returns the exit status."""
    from bicache_jax.measure.aot import AotCase, check, describe

    given = vars(args)
    case = AotCase(**{name: given[name] for name in AotCase.__dataclass_fields__ if name in given})
    with flag_named("mesh"), flag_named("config"):
        found = check(case)
    print(json.dumps(found, indent=1) if args.json else describe(found))
    return 0 if found["fits"] else EXIT_NO_FIT
