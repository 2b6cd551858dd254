"""Times of prefix attention on the device that is there, beside library attention and the device's roofline."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax.core.numerics import precision
from bicache_jax.testing import candidates, prefix_attention, shape_class

Inputs = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call of prefix attention; all tokens are valid, and rows share prefixes evenly.

    Attributes:
        name: in words.
        rows: B.
        prefixes: G.
        heads: N.
        kv_heads: K.
        head_dim: H.
        prefix: P.
        queries: T.
        suffix: S.
        dtype: of all arrays.
    """

    name: str
    rows: int
    prefixes: int
    heads: int
    kv_heads: int
    head_dim: int
    prefix: int
    queries: int
    suffix: int
    dtype: str = "bfloat16"

    @property
    def num_queries(self) -> int:
        """Queries of a row and KV head."""
        return self.heads // self.kv_heads * self.queries

    @property
    def flops(self) -> int:
        """Operations of both products."""
        return 4 * self.rows * self.heads * self.queries * (self.prefix + self.suffix) * self.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes that must move: queries and results, and keys and values, a shared prefix once."""
        keys = self.kv_heads * (self.prefixes * self.prefix + self.rows * self.suffix)
        return 2 * jnp.dtype(self.dtype).itemsize * self.head_dim * (self.rows * self.heads * self.queries + keys)

    def inputs(self) -> Inputs:
        """Random queries, keys and values of prefix and suffix; prefix index and lengths, valid suffix tokens."""
        keys = iter(jax.random.split(jax.random.key(0), 5))

        def normal(*shape: int) -> jax.Array:
            return jax.random.normal(next(keys), shape, jnp.dtype(self.dtype))

        return (
            normal(self.rows, self.heads, self.queries, self.head_dim),
            *(normal(self.prefixes, self.kv_heads, self.prefix, self.head_dim) for _ in range(2)),
            *(normal(self.rows, self.kv_heads, self.suffix, self.head_dim) for _ in range(2)),
            jnp.arange(self.rows, dtype=jnp.int32) * self.prefixes // self.rows,
            jnp.full((self.prefixes,), self.prefix, jnp.int32),
            jnp.ones((self.rows, self.suffix), bool),
        )


SHAPES = (
    Shape("LLaDA-8B, a suffix", 8, 1, 32, 32, 128, 1024, 512, 512),
    Shape("LLaDA-8B, a block", 8, 1, 32, 32, 128, 1024, 32, 512),
    Shape("LLaDA-8B, no prefix", 8, 1, 32, 32, 128, 0, 1536, 1536),
    Shape("Dream-7B, a suffix", 8, 1, 28, 4, 128, 1024, 512, 512),
    Shape("Dream-7B, a block", 8, 1, 28, 4, 128, 1024, 32, 512),
    Shape("LLaDA-8B, a prefix for each row", 8, 8, 32, 32, 128, 1024, 512, 512),
    Shape("heads of 64, a suffix", 8, 1, 32, 32, 64, 1024, 512, 512),
    Shape("float32, a suffix", 8, 1, 8, 8, 128, 1024, 512, 512, "float32"),
)
"""Shapes that `bicache doctor --full` times, the most important first."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one candidate on one shape.

    Attributes:
        shape: the shape.
        form: the candidate, in words.
        seconds: of a call; None: it failed.
        roofline: the larger of operations / peak and bytes / bandwidth, in parts of the time.
        row: of the platform's table, for what a table can pick; None for library attention.
        error: why it failed.
    """

    shape: Shape
    form: str
    seconds: float | None
    roofline: float | None = None
    row: dict[str, Any] | None = None
    error: str | None = None


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


def with_inputs(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A form of prefix attention that takes a shape's inputs by position."""

    def run(*inputs: jax.Array) -> jax.Array:
        *arrays, index, prefix_len, valid = inputs
        return call(*arrays, prefix_index=index, prefix_len=prefix_len, suffix_valid=valid)

    return run


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


def times(
    shapes: Sequence[Shape], platform: str, peaks: dict[str, float], bandwidth: float, *, least: float = 0.02
) -> Iterator[Timing]:
    """Times every candidate of every shape, plain JAX and library attention.

    Args:
        shapes: the shapes.
        platform: as jax names the platform of a program: `cuda`, `tpu` or `cpu`.
        peaks: operations a second of a large matrix product, by dtype.
        bandwidth: bytes a second; infinite where it is not known.
        least: seconds of a run.

    Yields:
        One timing after the other; one that fails has an error, and the others run.
    """
    for shape in shapes:
        inputs = shape.inputs()
        tried: list[tuple[str, dict[str, Any] | None, Callable[..., jax.Array]]] = [
            (candidate.name, candidate.row, with_inputs(candidate.call))
            for candidate in candidates(platform, shape.num_queries, shape.head_dim, shape.dtype)
        ]
        tried.append(("plain JAX", None, with_inputs(_plain)))
        tried.append(("library attention, KV gathered", None, gathered))
        limit = max(shape.flops / peaks[shape.dtype], shape.nbytes / bandwidth)
        for name, row, call in tried:
            try:
                taken = seconds(call, inputs, least)
            except Exception as fault:  # whatever a compiler or a driver raises
                yield Timing(shape, name, None, row=row, error=line(fault))
            else:
                yield Timing(shape, name, taken, limit / taken, row)


def line(fault: BaseException) -> str:
    """A fault of a compiler or a driver in one line, cut where it gets long."""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:300]


def _plain(*arrays: jax.Array, **named: Any) -> jax.Array:
    return prefix_attention(*arrays, **named, implementation="xla")


def best_rows(timings: Iterable[Timing], platform: str) -> list[dict[str, Any]]:
    """A table's rows: for each class of shapes that was timed, the candidate that takes the least.

    Where several shapes are in one class, the candidate counts whose times, in parts of the best one's of each shape,
    have the smallest sum; it must have run on all of them.
    """
    classes: dict[str, dict[str, dict[str, float]]] = {}  # class of shapes -> shape -> form -> seconds
    picks: dict[tuple[str, str], dict[str, Any]] = {}  # (class, form) -> row
    for timing in timings:
        if timing.row is not None and timing.seconds is not None:
            shape = timing.shape
            key = repr(shape_class(platform, shape.num_queries, shape.head_dim, shape.dtype))
            classes.setdefault(key, {}).setdefault(shape.name, {})[timing.form] = timing.seconds
            picks[key, timing.form] = timing.row
    rows = []
    for key, by_shape in classes.items():
        everywhere = sorted(set.intersection(*(set(forms) for forms in by_shape.values())))
        if everywhere:
            chosen = min(
                everywhere, key=lambda form: sum(taken[form] / min(taken.values()) for taken in by_shape.values())
            )
            found = ", ".join(f"{name} {1e3 * taken[chosen]:.3f} ms" for name, taken in by_shape.items())
            rows.append({**picks[key, chosen], "reason": f"measured: {found}"})
    # A row with a limit must come before the one that takes everything.
    return sorted(rows, key=lambda row: [row[name] or 2**30 for name in ("max_queries", "max_head_dim") if name in row])
