"""Checks for users: of a backbone of their own (`check_backbone`), and of prefix attention on their device.

Prefix attention has cases, their reference in float64, and the promised bounds. `bicache doctor` runs them on a user's
device, the tests run them in Pallas's interpreters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax.conformance import BackboneError as BackboneError
from bicache_jax.conformance import Fault as Fault
from bicache_jax.conformance import backbone_faults as backbone_faults
from bicache_jax.conformance import check_backbone as check_backbone
from bicache_jax.core.config import ATTENTION
from bicache_jax.core.kv import KV, floats, stored
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
        block: tokens of a block of the suffix, under block-causal attention; 0: full attention.
        quantized: the prefix is in 8 bits.
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
    block: int = 0
    quantized: bool = False

    def __str__(self) -> str:
        """A line that a report can hold."""
        parts = f"B={self.rows} G={self.prefixes} N={self.heads} K={self.kv} H={self.head_dim}"
        parts += f" P={self.prefix} T={self.queries} S={self.suffix} {self.dtype}"
        more = {"layers": self.layers, "block": self.block}
        parts += "".join(f" {name}={value}" for name, value in more.items() if value)
        return parts + " own" * self.own + " int8" * self.quantized

    def arrays(self, seed: int = 0) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Random inputs in float64: prefixes shuffled and ragged, one of several empty; holes in the suffixes.

        Returns:
            Queries, prefix keys and values, suffix keys and values; and `index` [B], `lengths` [G] and `valid` [B, S],
            under block-causal attention also `own` [B, T] and `blocks` [B, S], those of the queries and the suffixes.
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
        named = {"index": index.astype(np.int32), "lengths": lengths.astype(np.int32), "valid": valid}
        if self.block:
            first = rng.integers(-3, 1, (self.rows, 1))  # blocks may be counted from anywhere
            named["blocks"] = (first + np.arange(self.suffix) // self.block).astype(np.int32)
            named["own"] = (first + rng.integers(-1, self.suffix // self.block + 1, (self.rows, self.queries))).astype(
                np.int32
            )
        return tensors, named


SMALL_CASES = (
    AttentionCase(3, 2, 4, 4, 16, 8, 5, 5),
    # ragged blocks of everything, and more keys than a block of any kernel holds
    AttentionCase(3, 2, 4, 2, 64, 300, 20, 270, "bfloat16", layers=3),
    # a head size that is no power of two, more chunks than a stretch takes
    AttentionCase(4, 2, 6, 2, 20, 640, 3, 140),
    AttentionCase(2, 2, 7, 1, 128, 130, 6, 7, "bfloat16", own=True),
    AttentionCase(3, 1, 2, 2, 16, 40, 33, 0),
    AttentionCase(2, 1, 2, 1, 16, 0, 9, 140),
    AttentionCase(3, 2, 4, 2, 32, 40, 24, 150, block=8),
    AttentionCase(2, 1, 2, 2, 16, 0, 40, 270, "bfloat16", block=32),
    AttentionCase(3, 2, 4, 2, 20, 300, 7, 140, layers=3, block=8, quantized=True),
    AttentionCase(2, 2, 6, 2, 64, 130, 6, 7, "bfloat16", own=True, quantized=True),
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
    # SDAR's and LLaDA2's heads: a finished block and the next one, a prompt
    AttentionCase(8, 2, 32, 8, 128, 1024, 8, 512, "bfloat16", layers=2, block=4),
    AttentionCase(2, 1, 16, 4, 128, 512, 384, 512, "bfloat16", layers=2, block=32),
    # prefixes in 8 bits: LLaDA's suffix, Dream's block, heads too wide for Triton
    AttentionCase(3, 2, 8, 8, 128, 1024, 130, 512, "bfloat16", layers=2, quantized=True),
    AttentionCase(3, 1, 28, 4, 128, 1000, 32, 500, "bfloat16", layers=2, quantized=True),
    AttentionCase(3, 2, 8, 8, 128, 1024, 130, 512, "float32", layers=2, quantized=True),
    AttentionCase(2, 2, 4, 2, 256, 300, 40, 60, "bfloat16", quantized=True),
)
"""Cases for a device that computes them natively."""


def reference_attention(
    arrays: Sequence[np.ndarray],
    index: np.ndarray,
    prefix_len: np.ndarray,
    valid: np.ndarray,
    block_ids: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Prefix attention in float64, on prefix and suffix joined: what every implementation is held to.

    Args:
        arrays: queries [B, N, T, H], prefix keys and values [G, K, P, H], suffix keys and values [B, K, S, H].
        index: the prefix of each row [B].
        prefix_len: valid tokens of each prefix [G].
        valid: which suffix tokens may be attended to [B, S].
        block_ids: blocks of the queries [B, T] and of the suffix tokens [B, S], under block-causal attention.

    Returns:
        Attended values [B, N, T, H]; zeros in rows without a valid key.
    """
    q, k_prefix, v_prefix, k_suffix, v_suffix = (np.asarray(array, np.float64) for array in arrays)
    k, v = (np.concatenate([p[index], s], axis=2) for p, s in ((k_prefix, k_suffix), (v_prefix, v_suffix)))
    repeat = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeat, axis=1), np.repeat(v, repeat, axis=1)
    prefix = np.broadcast_to(
        np.arange(k_prefix.shape[2]) < prefix_len[index][:, None, None], (*q.shape[:1], q.shape[2], k_prefix.shape[2])
    )
    suffix = np.broadcast_to(valid[:, None], (*q.shape[:1], q.shape[2], valid.shape[1]))
    if block_ids is not None:
        suffix = suffix & (block_ids[1][:, None] <= block_ids[0][..., None])
    seen = np.concatenate([prefix, suffix], axis=2)
    scores = np.where(seen[:, None], q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = weights @ v / weights.sum(-1, keepdims=True)
    return np.nan_to_num(out)


def _cast(case: AttentionCase, tensors: Sequence[np.ndarray]) -> list[KV]:
    """A case's arrays in its dtype, or what it has in 8 bits."""
    arrays: list[KV] = [jnp.asarray(tensor, case.dtype) for tensor in tensors]
    if case.quantized:
        arrays[1:3] = [stored(jnp.asarray(tensor, case.dtype), "int8") for tensor in tensors[1:3]]
    return arrays


def operands(case: AttentionCase, seed: int = 0) -> tuple[list[KV], dict[str, Any]]:
    """A case's arrays in its dtype, and the arguments of `prefix_attention` by name: the last layer of a stack."""
    tensors, named = case.arrays(seed)
    arrays = _cast(case, tensors)
    settings: dict[str, Any] = {
        "prefix_index": None if case.own else jnp.asarray(named["index"]),
        "prefix_len": jnp.asarray(named["lengths"]),
        "suffix_valid": jnp.asarray(named["valid"]),
    }
    if case.block:
        settings["block_ids"] = jnp.asarray(named["own"]), jnp.asarray(named["blocks"])
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
    """The reference on a case's inputs, rounded to its dtype or to 8 bits [B, N, T, H]."""
    tensors, named = case.arrays(seed)
    rounded = [np.asarray(floats(array, np.float32), np.float64) for array in _cast(case, tensors)]
    if case.layers:
        rounded[1:3] = [rounded[1][-1], rounded[2][-1]]
    block_ids = (named["own"], named["blocks"]) if case.block else None
    return reference_attention(rounded, named["index"], named["lengths"], named["valid"], block_ids)


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
    return refusal(implementation, *jax.eval_shape(lambda: operands(case)[0]))
