"""Checks of prefix attention on whatever device is there: cases, their reference in float64, and the promised bounds.

`bicache doctor` runs them on a user's device, the tests run them in Pallas's interpreters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax.core.config import ATTENTION
from bicache_jax.kernels import elsewhere, refusal
from bicache_jax.kernels import prefix_attention as prefix_attention
from bicache_jax.kernels.forms import Candidate as Candidate
from bicache_jax.kernels.forms import candidates as candidates
from bicache_jax.kernels.forms import shape_class as shape_class
from bicache_jax.kernels.tuning import platform_here as platform_here
from bicache_jax.kernels.tuning import save_rows as save_rows

BOUNDS: Mapping[str, float] = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-2}
"""By dtype, the largest error of a result x for normally distributed inputs, absolute and in parts of |x| together."""


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Sizes of one call of prefix attention.

    Attributes:
        rows: B.
        prefixes: G.
        heads: query heads, N.
        kv: KV heads, K.
        head_dim: H.
        prefix: P.
        queries: T.
        suffix: S.
        dtype: of all arrays.
        layers: layers of a stacked cache; 0: the prefix of one layer is given alone.
        own: every row has its own prefix and no index is given.
    """

    rows: int
    prefixes: int
    heads: int
    kv: int
    head_dim: int
    prefix: int
    queries: int
    suffix: int
    dtype: str = "float32"
    layers: int = 0
    own: bool = False

    def __str__(self) -> str:
        """A line that a report can hold."""
        parts = f"B={self.rows} G={self.prefixes} N={self.heads} K={self.kv} H={self.head_dim}"
        parts += f" P={self.prefix} T={self.queries} S={self.suffix} {self.dtype}"
        return parts + (f" layers={self.layers}" if self.layers else "") + (" own" if self.own else "")

    def arrays(self, seed: int = 0) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Random inputs in float64: prefixes shuffled and ragged, one of several empty; holes in the suffixes.

        Returns:
            Queries, prefix keys and values, suffix keys and values; and `index` [B], `lengths` [G] and `valid` [B, S].
            The first row's suffix has nothing valid; with several prefixes its own is empty, and its result zero.
        """
        rng = np.random.default_rng(seed)
        prefix = (self.layers,) * bool(self.layers) + (self.prefixes, self.kv, self.prefix, self.head_dim)
        suffix = (self.rows, self.kv, self.suffix, self.head_dim)
        q = (self.rows, self.heads, self.queries, self.head_dim)
        tensors = [np.asarray(rng.normal(size=s)) for s in (q, prefix, prefix, suffix, suffix)]
        index = np.arange(self.rows) if self.own else rng.permutation(np.arange(self.rows) % self.prefixes)
        lengths = rng.integers(0, self.prefix + 1, self.prefixes)
        lengths[index[-1]] = self.prefix
        if self.prefixes > 1:
            lengths[index[0]] = 0
        valid = rng.random((self.rows, self.suffix)) < 0.7
        valid[0] = False
        return tensors, {"index": index.astype(np.int32), "lengths": lengths.astype(np.int32), "valid": valid}


SMALL_CASES = (
    AttentionCase(3, 2, 4, 4, 16, 8, 5, 5),
    # ragged blocks of everything, and more keys than a block of any kernel holds
    AttentionCase(3, 2, 4, 2, 64, 300, 20, 270, "bfloat16", layers=3),
    # a head size that is no power of two, more chunks than a stretch takes
    AttentionCase(4, 2, 6, 2, 20, 640, 3, 140),
    AttentionCase(2, 2, 7, 1, 128, 130, 6, 7, "bfloat16", own=True),
    AttentionCase(3, 1, 2, 2, 16, 40, 33, 0),
    AttentionCase(2, 1, 2, 1, 16, 0, 9, 140),
)
"""Cases that an interpreter gets through."""

DEVICE_CASES = (
    *SMALL_CASES,
    # LLaDA's and Dream's heads: a suffix, a block of a block cache, no prefix, a long one
    AttentionCase(3, 2, 8, 8, 128, 1024, 130, 512, "bfloat16", layers=2),
    AttentionCase(3, 1, 28, 4, 128, 1000, 32, 500, "bfloat16", layers=2),
    AttentionCase(4, 2, 4, 4, 128, 0, 64, 256, "bfloat16"),
    AttentionCase(2, 1, 4, 4, 64, 4096, 40, 300, "bfloat16"),
    AttentionCase(4, 4, 8, 8, 128, 256, 16, 32, "bfloat16", own=True),
    AttentionCase(3, 2, 8, 8, 128, 1024, 130, 512, "float32", layers=2),
    AttentionCase(3, 2, 8, 8, 128, 1024, 130, 512, "float16", layers=2),
    AttentionCase(2, 2, 4, 2, 256, 300, 40, 60, "bfloat16"),
    AttentionCase(2, 2, 4, 2, 256, 300, 40, 60, "float32"),
)
"""Cases for a device that computes them natively."""


def reference_attention(
    arrays: Sequence[np.ndarray], index: np.ndarray, prefix_len: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """Prefix attention in float64, on prefix and suffix joined: what every implementation is held to.

    Args:
        arrays: queries [B, N, T, H], prefix keys and values [G, K, P, H], suffix keys and values [B, K, S, H].
        index: the prefix of each row [B].
        prefix_len: valid tokens of each prefix [G].
        valid: which suffix tokens may be attended to [B, S].

    Returns:
        Attended values [B, N, T, H]; zeros in rows without a valid key.
    """
    q, k_prefix, v_prefix, k_suffix, v_suffix = (np.asarray(array, np.float64) for array in arrays)
    k, v = (np.concatenate([p[index], s], axis=2) for p, s in ((k_prefix, k_suffix), (v_prefix, v_suffix)))
    repeat = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeat, axis=1), np.repeat(v, repeat, axis=1)
    seen = np.concatenate([np.arange(k_prefix.shape[2]) < prefix_len[index][:, None], valid], axis=1)
    scores = np.where(seen[:, None, None], q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = weights @ v / weights.sum(-1, keepdims=True)
    return np.nan_to_num(out)


def operands(case: AttentionCase, seed: int = 0) -> tuple[list[jax.Array], dict[str, jax.Array | None]]:
    """A case's arrays in its dtype, and the arguments of `prefix_attention` by name: the last layer of a stack."""
    tensors, named = case.arrays(seed)
    arrays = [jnp.asarray(tensor, case.dtype) for tensor in tensors]
    settings: dict[str, jax.Array | None] = {
        "prefix_index": None if case.own else jnp.asarray(named["index"]),
        "prefix_len": jnp.asarray(named["lengths"]),
        "suffix_valid": jnp.asarray(named["valid"]),
    }
    if case.layers:
        settings["layer"] = jnp.asarray(case.layers - 1)
    return arrays, settings


def attend(case: AttentionCase, call: Callable[..., jax.Array], seed: int = 0) -> np.ndarray:
    """Runs an implementation on a case, jitted, so with the layer of a stack traced.

    Returns:
        Its result in float64 [B, N, T, H].
    """
    arrays, settings = operands(case, seed)
    out = jax.jit(call)(*arrays, **settings)
    if out.dtype != case.dtype:
        raise TypeError(f"the result is {out.dtype}, not {case.dtype}")
    return np.asarray(out, np.float64)


def exact(case: AttentionCase, seed: int = 0) -> np.ndarray:
    """The reference on a case's inputs, rounded to its dtype [B, N, T, H]."""
    tensors, named = case.arrays(seed)
    rounded = [np.asarray(jnp.asarray(tensor, case.dtype), np.float64) for tensor in tensors]
    if case.layers:
        rounded[1:3] = [rounded[1][-1], rounded[2][-1]]
    return reference_attention(rounded, named["index"], named["lengths"], named["valid"])


def error_over_bound(out: np.ndarray, wanted: np.ndarray, dtype: str) -> float:
    """The largest error in units of the bound: at most 1 is right; infinite where a value is not finite."""
    if not np.isfinite(out).all():
        return float("inf")
    return float(np.max(np.abs(out - wanted) / (BOUNDS[dtype] * (1 + np.abs(wanted))), initial=0))


def kernels() -> list[str]:
    """Names of the kernels of all platforms."""
    return [name for name in ATTENTION if name not in ("auto", "xla")]


def kernel_here() -> str | None:
    """The kernel of this process's platform; None if there is none."""
    return next((name for name in kernels() if elsewhere(name, platform_here()) is None), None)


def refused(case: AttentionCase, implementation: str) -> str | None:
    """Why a kernel does not serve a case, on any platform; None if it does."""
    shapes = [
        (case.rows, case.heads, case.queries, case.head_dim),
        *[(case.prefixes, case.kv, case.prefix, case.head_dim)] * 2,
        *[(case.rows, case.kv, case.suffix, case.head_dim)] * 2,
    ]
    return refusal(implementation, *(jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes))
