"""What a kernel may be run with on a platform, for measurements: each candidate as a function and as a table's row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from bicache_jax.kernels import gpu, tpu

FEW_QUERIES = {"cuda": gpu.FEW_QUERIES, "tpu": tpu.FEW_QUERIES}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to compute prefix attention.

    Attributes:
        name: in words.
        row: the row of a platform's table that picks it for shapes of this class.
        call: `prefix_attention`, computed so.
    """

    name: str
    row: dict[str, Any]
    call: Callable[..., Array]


def shape_class(platform: str, num_queries: int, head_dim: int, dtype: Any) -> dict[str, Any]:
    """The fields of a table's row that say which shapes it serves.

    Args:
        platform: `cuda` or `tpu`.
        num_queries: queries per row and KV head, `N / K * T`.
        head_dim: H.
        dtype: of the arrays; both 16-bit types are one class.
    """
    few = FEW_QUERIES[platform]
    limits: dict[str, Any] = {"max_queries": few if num_queries <= few else 0}
    itemsize = jnp.dtype(dtype).itemsize
    if platform == "tpu":
        return limits | {"itemsize": itemsize}
    widths = [width for width in (64, 128) if head_dim <= width]
    dtypes = ["bfloat16", "float16"] if itemsize == 2 else [jnp.dtype(dtype).name]
    return limits | {"max_head_dim": widths[0] if widths else 0, "dtypes": dtypes}


def candidates(platform: str, num_queries: int, head_dim: int, dtype: Any) -> list[Candidate]:
    """What is worth timing for a shape; none on a platform without a kernel. Arguments as for `shape_class`."""
    if platform not in FEW_QUERIES:
        return []
    limits = shape_class(platform, num_queries, head_dim, dtype)
    found = []
    if platform == "cuda":
        for form in gpu.candidates(num_queries, head_dim, dtype):
            sizes = f"triton {form.queries} x {form.keys}, {form.warps} warps, {form.stages} stages"
            name = sizes if form.form == "triton" else f"{form.form} ({form.library})"
            call = functools.partial(gpu.prefix_attention, form=form)
            found.append(Candidate(name, limits | dataclasses.asdict(form), call))
        return found
    for blocks in tpu.candidates(num_queries, jnp.dtype(dtype).itemsize):
        name = f"mosaic {blocks.queries} x {blocks.keys}, {blocks.chunks} chunks"
        call = functools.partial(tpu.prefix_attention, blocks=blocks)
        found.append(Candidate(name, limits | dataclasses.asdict(blocks), call))
    return found
