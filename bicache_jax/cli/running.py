"""Flags of every command that runs a model on requests: which model, how prefixes are reused, on what it runs."""

from __future__ import annotations

import argparse

from bicache_jax.cli import backend
from bicache_jax.cli.options import (
    DTYPE_HELP,
    Parser,
    add_cache_dtype_flag,
    add_checkpoint_flags,
    auto_or_integer,
    boundary,
    from_flags,
    integer,
)
from bicache_jax.core.config import BLOCK_CACHES, DTYPES, POLICIES, PREFIX_DETECTIONS, CacheConfig
from bicache_jax.core.types import BicacheError


def add_model_arguments(parser: Parser, *, required: bool = True) -> None:
    """Adds the flags that name a model.

    Args:
        parser: where to.
        required: whether there must be one.
    """
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=required, metavar="M", help="folder in Hugging Face layout, hub id, or 'example' (bundled)"
    )
    add_checkpoint_flags(model)
    model.add_argument("--dtype", choices=DTYPES, default="auto", help=DTYPE_HELP)


def add_cache_arguments(parser: Parser) -> None:
    """Adds the flags that say how prefixes are reused."""
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--policy",
        choices=("auto", *POLICIES),
        default="auto",
        help="none: no prefix cache; naive: reuse the prefix in all layers, as a causal model would; bicache: in"
        " shallow layers, refreshed in deep ones; exact: keep all that is finished, where attention is block-causal and"
        " nothing later changes it; auto: bicache, or exact where the model's attention is block-causal (default:"
        " %(default)s)",
    )
    cache.add_argument(
        "--boundary",
        type=boundary,
        default="auto",
        metavar="auto|INT",
        help="layers that count as shallow; auto: from the boundary table, by the prefix's share of the sequence"
        " (default: %(default)s)",
    )
    cache.add_argument(
        "--boundary-table", metavar="FILE", help="boundary table to use for 'auto' (default: the model's own)"
    )
    cache.add_argument(
        "--refresh-interval",
        type=auto_or_integer(1),
        default="auto",
        metavar="auto|N",
        help="denoising steps from one refresh of the deep layers to the next; auto: 16, with a block cache a block's"
        " steps (default: %(default)s)",
    )
    cache.add_argument(
        "--block-cache",
        choices=BLOCK_CACHES,
        default="off",
        help="keep keys and values outside the current block until it is done: dual all of them, prefix those before it"
        " (Fast-dLLM); approximate, like every policy but none (default: %(default)s)",
    )
    add_cache_dtype_flag(cache)
    cache.add_argument(
        "--batch-boundary",
        choices=("own", "min"),
        default="own",
        help="own: each request its own boundary; min: requests batched together take their smallest, which makes"
        " results depend on their neighbours (default: %(default)s)",
    )

    cache.add_argument(
        "--prefix-detection",
        choices=PREFIX_DETECTIONS,
        default="auto",
        help="where the prefix of a request comes from that has no prefix_len. auto: all its messages but the last of"
        " the user, its whole prompt for several samples, else what it shares with the other requests of the run, so"
        " that another run may give another prefix, and with it other tokens; messages: not from other requests; off:"
        " from prefix_len only. With messages and off, a request gets the same tokens alone and in any run (default:"
        " %(default)s)",
    )


def add_device_arguments(parser: Parser) -> None:
    """Adds the flags that say on what a command runs."""
    running = parser.add_argument_group("running")
    running.add_argument("--batch-size", type=integer(1), metavar="N", help="rows of a batch (default: planned)")
    running.add_argument(
        "--mesh",
        metavar="data=D,model=M",
        help="devices to run on: D batches at a time, each model cut over M devices (default: one device)",
    )
    running.add_argument(
        "--prefix-cache",
        dest="prefix_cache_dir",
        metavar="DIR",
        help="where encoded prefixes outlive the run: later and other processes of the same model and kind of device"
        " take them from there, for the same tokens (default: none)",
    )
    backend.add_attention_flag(running)
    backend.add_compilation_flags(running)
    running.add_argument("--quiet", action="store_true", help="no progress bar and no closing line")


def cache_from_flags(args: argparse.Namespace) -> CacheConfig:
    """What the flags say about caching.

    Raises:
        BicacheError: flags that do not go together.
    """
    if args.policy == "none" and args.boundary_table is not None:
        raise BicacheError("--policy none keeps no prefix cache, so it takes no --boundary-table")
    if args.boundary != "auto" and args.boundary_table is not None:
        raise BicacheError(f"--boundary {args.boundary} leaves --boundary-table without use: give one of them")
    if args.policy == "naive" and (args.boundary != "auto" or args.boundary_table is not None):
        raise BicacheError("--policy naive has its boundary at the last layer: --policy bicache takes another one")
    return from_flags(
        CacheConfig,
        policy=args.policy,
        boundary=args.boundary,
        refresh_interval=args.refresh_interval,
        block_cache=args.block_cache,
        batch_boundary=args.batch_boundary,
        prefix_detection=args.prefix_detection,
        cache_dtype=args.cache_dtype,
    )
