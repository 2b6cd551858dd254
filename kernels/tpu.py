"""Prefix attention on TPUs: one Mosaic kernel, KV streamed through VMEM, softmax online over prefix and suffix.

A grid step holds a block of queries of one row and one KV head (the query heads of that KV head are folded into more
queries). It reads a stretch of the row's prefix and a block of its suffix. The prefix arrives in *chunks*: one operand
per chunk of the stretch, all the same array, each with its own index map that points to
`[layer, prefix_index[row], head, chunk]` of the stacked cache. So nothing is sliced or gathered first. A chunk of
padding keeps the index that its operand had before, so the pipeline does not fetch it again. And because a head
processes rows in order, a prefix that fits into one stretch stays in VMEM for all consecutive rows that share it.

What limits it, for one layer and one row in bfloat16 (operations `4 N T (P + S) H`; bytes: queries and results
`4 N T H`, KV `4 K (P + S) H`, a shared prefix counted once for all rows that share it). A v5e changes from memory-bound
to compute-bound at 197e12 / 819e9 = 241 operations per byte, a v5p at 166, a v6e at 560, a TPU7x at 313:

| model, P = 1024 | T = S | GFLOP | MB own prefix | op/byte | MB shared by 8 | op/byte | bound on v5e |
|---|---|---|---|---|---|---|---|
| LLaDA-8B (N 32, K 32, H 128) | 384 | 8.86 | 29.4 | 302 | 14.7 | 604 | arithmetic |
| LLaDA-8B | 32 | 0.55 | 17.8 | 31 | 3.1 | 176 | memory |
| Dream-7B (N 28, K 4, H 128) | 384 | 7.75 | 8.4 | 924 | 6.6 | 1183 | arithmetic |
| Dream-7B | 32 | 0.48 | 2.6 | 185 | 0.8 | 616 | memory, arithmetic if shared |

Sharing a prefix between rows pays off if the call is memory-bound: blocks of a block cache (T = 32), long prefixes,
models with as many KV heads as query heads. With whole suffixes as queries (T = 384) the call is compute-bound, and
sharing saves memory traffic that was already hidden. Scores never leave VMEM: in HBM they would be another
4 N T (P + S) bytes, 69 MB per row for LLaDA-8B at T = 384, more than twice all other traffic.

A prefix in 8 bits is fetched as integers, with a row of scales for each chunk, so its part of these bytes is half. In
VMEM a chunk becomes floats, which is exact; scales meet scores and weights, which are there in float32 anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from bicache_jax.core.kv import Quantized, arrays_of
from bicache_jax.core.numerics import precision
from bicache_jax.kernels.axes import spread
from bicache_jax.kernels.tuning import device_kind, rows

UNSEEN = float(jnp.finfo(jnp.float32).min) * 0.5  # finite: with nothing seen yet, -inf - -inf would be nan
LANES = 128
FEW_QUERIES = 128
"""Queries of a row and KV head up to which a shape is a block of a block cache."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of a grid step; a row of `tpu_blocks.json`.

    Attributes:
        queries: largest number of queries in a block.
        keys: largest number of keys in a prefix chunk or a suffix block; a multiple of 128.
        chunks: largest number of chunks in a stretch of the prefix; `chunks * keys` is the longest prefix that stays in
            VMEM from one row to the next.
        vmem_mib: VMEM that the compiler may use.
    """

    queries: int
    keys: int
    chunks: int
    vmem_mib: int = 16

    def __post_init__(self) -> None:
        if self.queries < 1 or self.queries % 16:
            raise ValueError(f"queries must be a positive multiple of 16, got {self.queries}")
        if self.keys < 1 or self.keys % LANES:
            raise ValueError(f"keys must be a positive multiple of {LANES}, got {self.keys}")
        if self.chunks < 1:
            raise ValueError(f"chunks must be >= 1, got {self.chunks}")


def blocks_for(kind: str | None, num_queries: int, itemsize: int) -> Blocks:
    """Looks up the block sizes for a call.

    Args:
        kind: device kind as JAX names it; None or unknown: sizes that fit every generation.
        num_queries: queries per row and KV head, `N / K * T`.
        itemsize: bytes per number.

    Returns:
        The first row of the table that fits.
    """
    for row in rows("tpu", kind):
        if num_queries <= (row["max_queries"] or num_queries) and itemsize == row["itemsize"]:
            return Blocks(**{field.name: row[field.name] for field in dataclasses.fields(Blocks) if field.name in row})
    raise NotImplementedError(f"no block sizes for numbers of {itemsize} bytes")


def candidates(num_queries: int, itemsize: int) -> list[Blocks]:
    """Block sizes that are worth timing for a shape; `blocks_for` describes the arguments."""
    if num_queries <= FEW_QUERIES:
        tried = [(128, 1024, 4), (128, 512, 8), (128, 512, 4), (128, 256, 8), (128, 2048, 2)]
    else:
        tried = [(512, 512, 8), (1024, 512, 8), (256, 512, 8), (512, 1024, 4), (512, 256, 16), (256, 1024, 4)]
    if itemsize > 2:
        tried = [(max(16, queries // 2), keys, max(1, chunks // 2)) for queries, keys, chunks in tried]
    return [Blocks(*sizes) for sizes in tried]


def _cut(length: int, most: int, multiple: int) -> tuple[int, int]:
    """Even blocks of at most `most`: (size, count). A single block has size `length`."""
    count = pl.cdiv(length, most)
    return (length, count) if count <= 1 else (pl.cdiv(pl.cdiv(length, count), multiple) * multiple, count)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static sizes of a call.

    Attributes:
        size_q: queries per block.
        size_p: keys per prefix chunk.
        chunks: chunks per stretch; 0: no prefix.
        size_s: keys per suffix block; 0: no suffix.
        num_p: keys in the prefix.
        num_s: keys in the suffix.
        steps: steps over the keys.
        count_q: blocks of queries.
    """

    size_q: int
    size_p: int
    chunks: int
    size_s: int
    num_p: int
    num_s: int
    steps: int
    count_q: int

    @classmethod
    def of(cls, num_q: int, num_p: int, num_s: int, blocks: Blocks) -> Tiling:
        """Cuts the sizes of a call into even blocks."""
        size_q, count_q = _cut(num_q, blocks.queries, 16)
        size_p, count_p = _cut(num_p, blocks.keys, LANES)
        size_s, count_s = _cut(num_s, blocks.keys, LANES)
        stretches = pl.cdiv(count_p, blocks.chunks)
        chunks = pl.cdiv(count_p, stretches) if stretches else 0
        return cls(size_q, size_p, chunks, size_s, num_p, num_s, max(stretches, count_s), count_q)


def _kernel(
    layer_ref: Any,
    index_ref: Any,
    prefix_len_ref: Any,
    suffix_len_ref: Any,
    *refs: Any,
    tiling: Tiling,
    scale: float,
    causal: bool,
    quantized: bool,
) -> None:
    """One grid step: head, row, block of queries, stretch of the keys."""
    del layer_ref, index_ref  # the index maps read them
    refs_left = list(refs)
    q_ref = refs_left.pop(0)
    own_ref = refs_left.pop(0) if causal else None
    chunks = [[refs_left.pop(0) for _ in range(tiling.chunks)] for _ in range(4 if quantized else 2)]
    suffix_refs = [refs_left.pop(0) for _ in range(3 if tiling.size_s else 0)]
    out_ref, peak_ref, total_ref, sum_ref = refs_left
    row, step = pl.program_id(1), pl.program_id(3)
    high = precision(q_ref.dtype)

    @pl.when(step == 0)
    def _() -> None:
        peak_ref[...] = jnp.full_like(peak_ref, UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def attend(
        k_ref: Any, v_ref: Any, valid: Array, rest: Array | None, k_scale: Any = None, v_scale: Any = None
    ) -> None:
        """Attends to one block of keys; only its first `rest` are inside the array, and the others may be anything."""
        k = k_ref[...].astype(q_ref.dtype)
        scores = jax.lax.dot_general(
            q_ref[...], k, (((1,), (1,)), ((), ())), precision=high, preferred_element_type=jnp.float32
        )
        scores = scores if k_scale is None else scores * k_scale
        scores = jnp.where(valid, scores * scale, UNSEEN)
        v = v_ref[...].astype(q_ref.dtype)
        if rest is not None:
            v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (v.shape[0], 1), 0) < rest, v, jnp.zeros_like(v))
        before = peak_ref[...]
        peak = jnp.maximum(before, jnp.max(scores, axis=-1, keepdims=True))
        shrink, weights = jnp.exp(before - peak), jnp.exp(scores - peak)
        if causal:  # a query may see none of these keys, and its peak is then none of theirs
            weights = jnp.where(valid, weights, 0)
        peak_ref[...] = peak
        total_ref[...] = shrink * total_ref[...] + jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights if v_scale is None else weights * v_scale
        sum_ref[...] = shrink * sum_ref[...] + jax.lax.dot_general(
            weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), precision=high, preferred_element_type=jnp.float32
        )

    for i, chunk in enumerate(zip(*chunks, strict=True)):
        left = prefix_len_ref[row] - (step * tiling.chunks + i) * tiling.size_p

        @pl.when(left > 0)
        def _(chunk: Any = chunk, left: Array = left) -> None:
            k_ref, v_ref, *scale_refs = chunk
            valid = jax.lax.broadcasted_iota(jnp.int32, (1, tiling.size_p), 1) < left
            scales = (jnp.where(valid, ref[...], 0) for ref in scale_refs)
            attend(k_ref, v_ref, valid, left if tiling.num_p % tiling.size_p else None, *scales)

    if suffix_refs:
        k_ref, v_ref, valid_ref = suffix_refs
        left = suffix_len_ref[row] - step * tiling.size_s

        @pl.when(left > 0)
        def _() -> None:
            valid = valid_ref[...] != 0 if own_ref is None else valid_ref[...] <= own_ref[...]
            if tiling.num_s % tiling.size_s:
                valid &= jax.lax.broadcasted_iota(jnp.int32, valid.shape, 1) < left
            attend(k_ref, v_ref, valid, left if tiling.num_s % tiling.size_s else None)

    @pl.when(step == tiling.steps - 1)
    def _() -> None:
        total = total_ref[...]
        out_ref[...] = (sum_ref[...] / jnp.where(total == 0, 1, total)).astype(out_ref.dtype)


def _blocks(length: Any, size: int) -> Any:
    """Number of blocks that cover `length`; `//` would query the chip's generation, which is not always known."""
    return jax.lax.div(length + (size - 1), size)


def block_specs(
    tiling: Tiling, head_dim: int, *, causal: bool = False, quantized: bool = False
) -> tuple[list[Any], Any]:
    """Block specs of the operands and the result. Grid: head, row, block of queries, stretch of the keys."""

    def queries(k: Any, b: Any, m: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return b, k, m, 0

    def chunk(i: int, *, scales: bool = False) -> Any:
        def at(k: Any, b: Any, m: Any, j: Any, layer: Any, index: Any, prefix_len: Any, _: Any) -> tuple[Any, ...]:
            del m
            last = _blocks(prefix_len[b], tiling.size_p) - 1  # the row's last chunk that is not padding
            there = last >= i
            stay = jnp.minimum(j, jax.lax.div(jnp.maximum(last - i, 0), tiling.chunks))
            where = (layer[0], index[b], k, stay * tiling.chunks + i)
            *at_head, place = (jnp.where(there, part, 0) for part in where)
            return (*at_head, 0, place) if scales else (*at_head, place, 0)

        return at

    def suffix_block(b: Any, j: Any, suffix_len: Any) -> Any:
        return jnp.minimum(j, jnp.maximum(_blocks(suffix_len[b], tiling.size_s) - 1, 0))

    def suffix(k: Any, b: Any, m: Any, j: Any, _: Any, __: Any, ___: Any, suffix_len: Any) -> tuple[Any, ...]:
        return b, k, suffix_block(b, j, suffix_len), 0

    def mask(k: Any, b: Any, m: Any, j: Any, _: Any, __: Any, ___: Any, suffix_len: Any) -> tuple[Any, ...]:
        return b, 0, suffix_block(b, j, suffix_len)

    result = pl.BlockSpec((None, None, tiling.size_q, head_dim), queries)
    chunks = [pl.BlockSpec((None, None, None, tiling.size_p, head_dim), chunk(i)) for i in range(tiling.chunks)]
    own_ids = [pl.BlockSpec((None, tiling.size_q, 1), lambda k, b, m, j, *_: (b, m, 0))] * causal
    lines = [
        pl.BlockSpec((None, None, None, 1, tiling.size_p), chunk(i, scales=True))
        for i in range(tiling.chunks if quantized else 0)
    ]
    specs = [result, *own_ids, *chunks, *chunks, *lines, *lines]
    if tiling.size_s:
        own = pl.BlockSpec((None, None, tiling.size_s, head_dim), suffix)
        specs += [own, own, pl.BlockSpec((None, 1, tiling.size_s), mask)]
    return specs, result


@jax.custom_batching.custom_vmap
def _in_hbm(array: Array) -> Array:
    """Keeps an operand of the kernel out of vector memory; `custom_vmap`, as the constraint has no batching rule."""
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


@_in_hbm.def_vmap
def _in_hbm_batched(axis_size: int, batched: list[bool], array: Array) -> tuple[Array, bool]:
    return _in_hbm(array), batched[0]


def prefix_attention(
    q: Float[Array, "B N T H"],
    k_prefix: Float[Array, "*L G K P H"] | Quantized,
    v_prefix: Float[Array, "*L G K P H"] | Quantized,
    k_suffix: Float[Array, "B K S H"],
    v_suffix: Float[Array, "B K S H"],
    *,
    prefix_index: Int[Array, " B"] | None = None,
    prefix_len: Int[Array, " G"],
    suffix_valid: Bool[Array, "B S"],
    block_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    scale: float | None = None,
    layer: Int[Array, ""] | int | None = None,
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B N T H"]:
    """`bicache_jax.core.attention.prefix_attention` as a Mosaic kernel; arguments and result are described there.

    Args:
        q: queries.
        k_prefix: prefix keys, a layer's or the stack's.
        v_prefix: prefix values.
        k_suffix: suffix keys.
        v_suffix: suffix values.
        prefix_index: prefix of each row.
        prefix_len: valid tokens of each prefix.
        suffix_valid: which suffix tokens may be attended to.
        block_ids: blocks of the queries and of the suffix tokens, under block-causal attention.
        scale: factor of the scores.
        layer: layer of the stack.
        blocks: block sizes; None: looked up in the table.
        interpret: run in an interpreter: True: Pallas's generic one; `InterpretParams`: the TPU interpreter.

    Returns:
        Attended values.
    """
    num_rows, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_suffix = k_suffix.shape[1:3]
    *_, num_prefixes, _, num_prefix, _ = k_prefix.shape
    prefix, quantized = arrays_of(k_prefix, v_prefix), isinstance(k_prefix, Quantized)
    if not q.size or not (num_prefix or num_suffix):
        return jnp.zeros_like(q)
    folded = num_heads // num_kv_heads * num_queries
    blocks = blocks or blocks_for(device_kind("tpu"), folded, q.dtype.itemsize)
    tiling = Tiling.of(folded, num_prefix, num_suffix, blocks)
    if layer is None:
        prefix, layer = [array[None] for array in prefix], 0

    index = jnp.arange(num_rows) if prefix_index is None else jnp.clip(prefix_index, 0, num_prefixes - 1)
    seen = jnp.where(suffix_valid, jnp.arange(num_suffix) + 1, 0)
    scalars = (
        jnp.clip(jnp.asarray(layer), 0, prefix[0].shape[0] - 1).reshape(1),
        index,
        jnp.clip(prefix_len[index], 0, num_prefix),
        jnp.max(seen, axis=1, initial=0),
    )
    if not interpret:
        # The compiler would bring the whole stack into vector memory, in every layer, where it fits beside the weights.
        prefix = [*map(_in_hbm, prefix)]
    own_ids, seen_ids = [], suffix_valid.astype(jnp.int32)
    causal = block_ids is not None and bool(num_suffix)
    if causal and block_ids is not None:
        own_ids = [jnp.tile(block_ids[0], (1, num_heads // num_kv_heads)).astype(jnp.int32)[..., None]]
        seen_ids = jnp.where(suffix_valid, block_ids[1], jnp.iinfo(jnp.int32).max).astype(jnp.int32)
    operands = [
        q.reshape(num_rows, num_kv_heads, folded, head_dim),
        *own_ids,
        *(array for array in prefix for _ in range(tiling.chunks)),
    ]
    if tiling.size_s:
        operands += [k_suffix, v_suffix, seen_ids[:, None]]
    operands = [*(scalar.astype(jnp.int32) for scalar in scalars), *operands]
    operands, axes = spread(operands)
    in_specs, out_spec = block_specs(tiling, head_dim, causal=causal, quantized=quantized)
    keys, prefix_heads = num_prefix + num_suffix, num_kv_heads * num_prefixes
    prefix_bytes = prefix_heads * sum(math.prod(array.shape[3:]) * array.dtype.itemsize for array in prefix)
    with jax.named_scope("prefix_attention"):
        out = pl.pallas_call(
            functools.partial(
                _kernel,
                tiling=tiling,
                scale=head_dim**-0.5 if scale is None else scale,
                causal=causal,
                quantized=quantized,
            ),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(num_kv_heads, num_rows, tiling.count_q, tiling.steps),
                in_specs=in_specs,
                out_specs=out_spec,
                scratch_shapes=[
                    pltpu.VMEM((tiling.size_q, 1), jnp.float32),
                    pltpu.VMEM((tiling.size_q, 1), jnp.float32),
                    pltpu.VMEM((tiling.size_q, head_dim), jnp.float32),
                ],
            ),
            out_shape=jax.ShapeDtypeStruct((num_rows, num_kv_heads, folded, head_dim), q.dtype, manual_axis_type=axes),
            # Heads, rows and queries are independent, so chips with two cores may split any of them.
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=blocks.vmem_mib << 20,
            ),
            cost_estimate=pl.CostEstimate(
                flops=4 * num_rows * num_heads * num_queries * keys * head_dim,
                transcendentals=num_rows * num_heads * num_queries * keys,
                bytes_accessed=prefix_bytes
                + 2
                * q.dtype.itemsize
                * head_dim
                * (num_rows * num_heads * num_queries + num_kv_heads * num_rows * num_suffix),
            ),
            interpret=interpret,
            name="prefix_attention",
        )(*operands)
    return out.reshape(q.shape)
