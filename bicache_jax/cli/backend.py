"""From flags to a loaded model and a session; the library, and jax with it, is imported here when it is needed."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from bicache_jax.cli.options import FlagGroup, flag_named, flags_named, warn
from bicache_jax.core.config import ATTENTION, CacheConfig, SamplingConfig
from bicache_jax.core.types import BicacheError, Model

if TYPE_CHECKING:
    from bicache_jax.core.boundary import BoundaryTable
    from bicache_jax.serving.session import Session


def open_session(
    args: argparse.Namespace, cache: CacheConfig, sampling: SamplingConfig, *, alone: bool = False
) -> Session:
    """Loads the model that the flags name, with their settings. Importing jax takes a second, so it happens here.

    Args:
        args: the flags.
        cache: how prefixes are reused, except for the boundary table.
        sampling: how canvases are denoised.
        alone: make a mesh of this process's devices, though there are other processes.

    Raises:
        BicacheError: the model or the table cannot be read, or they do not go together.
    """
    import jax

    from bicache_jax.core.boundary import load_table
    from bicache_jax.serving.session import Session
    from bicache_jax.sharding import make_mesh

    table = load_table(args.boundary_table) if args.boundary_table is not None else None
    with flag_named("mesh"):
        mesh = make_mesh(args.mesh, jax.local_devices() if alone else None) if args.mesh is not None else None
    if mesh is None and alone and jax.local_device_count() > 1:
        warn(f"this process has {jax.local_device_count()} devices and uses one of them: --mesh names more")
    model = load(args, mesh)
    if table is not None:
        cache = with_table(args, cache, table, model)
    with flags_named("gen_length", "steps", "block_length", "block_cache", "boundary", "policy"):
        cache = cache.for_model(model.config)
        cache.with_blocks(sampling, model.config)  # what does not go together is refused here
    if args.early_stop is None:  # a text ends there; token ids without one are taken whole
        sampling = dataclasses.replace(sampling, early_stop=model.tokenizer is not None)
    with flag_named("prefix_cache_dir", "--prefix-cache"):
        return Session(
            model,
            cache=cache,
            sampling=sampling,
            batch_size=args.batch_size,
            attention=args.attention,
            mesh=mesh,
            prefix_cache_dir=args.prefix_cache_dir,
        )


def with_table(args: argparse.Namespace, cache: CacheConfig, table: BoundaryTable, model: Model) -> CacheConfig:
    """Settings that use the boundary table of the flags, with a warning where it was made for another checkpoint.

    Raises:
        BicacheError: the table is for another depth.
    """
    try:
        doubt = table.doubt(model)
    except BicacheError as error:
        raise BicacheError(f"--boundary-table {args.boundary_table} {error}") from None
    if doubt:
        warn(f"--boundary-table {args.boundary_table} {doubt}")
    return dataclasses.replace(cache, table=table.table)


def load(args: argparse.Namespace, mesh: Any = None) -> Model:
    """Loads the model that the flags name, onto a mesh if there is one, compiled programs kept as they say.

    Raises:
        BicacheError: it cannot be read.
    """
    from bicache_jax.loading import load_model

    start_compilation_cache(args)
    return load_model(
        args.model,
        dtype=args.dtype,
        mask_id=args.mask_id,
        block_causal=args.block_causal,
        right_shift_logits=args.right_shift_logits,
        quantize=args.quantize,
        mesh=mesh,
        check_weights=args.check_weights,
    )


def random(args: argparse.Namespace) -> Model:
    """Makes the random model that the flags name, compiled programs kept as they say.

    Raises:
        BicacheError: there is no such shape.
    """
    from bicache_jax.loading import random_model

    start_compilation_cache(args)
    return random_model(args.random, dtype=args.dtype, quantize=args.quantize or "none")


def add_attention_flag(group: FlagGroup) -> None:
    """Adds the flag that picks an implementation of attention."""
    group.add_argument(
        "--attention",
        choices=ATTENTION,
        default="auto",
        help="implementation of attention; auto: the kernel of the platform, xla: plain JAX, a name: that kernel or an"
        " error (default: %(default)s)",
    )


def add_compilation_flags(group: FlagGroup) -> None:
    """Adds the flags of the persistent compilation cache."""
    compilation = group.add_mutually_exclusive_group()
    compilation.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="where compiled programs are kept for the next run (default: $BICACHE_COMPILATION_CACHE, or bicache-jax/"
        " in the user's cache folder; $JAX_COMPILATION_CACHE_DIR stays)",
    )
    compilation.add_argument("--no-compilation-cache", action="store_true", help="keep none")


def start_compilation_cache(args: argparse.Namespace) -> None:
    """Lets XLA keep compiled programs for the next run, unless the user has set that up already.

    Raises:
        BicacheError: the folder that the flags name cannot be written.
    """
    from bicache_jax.serving.compilation import use_compilation_cache

    folder = args.compilation_cache
    try:
        use_compilation_cache(False if args.no_compilation_cache else folder)
    except OSError as error:
        named = f"--compilation-cache {folder}" if folder else "the folder that $BICACHE_COMPILATION_CACHE names"
        raise BicacheError(f"cannot write {named}: {error.strerror}") from error
