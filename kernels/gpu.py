"""Prefix attention on NVIDIA GPUs: a Pallas kernel in Triton, and a form built on JAX's own attention.

*Triton*: a program holds a block of queries of one row and one KV head (the query heads of that KV head are folded into
more queries). It loops over the row's prefix and suffix with an online softmax in float32. Layer and prefix indices are
read from memory, so the stacked cache is neither sliced nor gathered and padding is skipped. Rows with the same prefix
that run at the same time find its KV in L2 (LLaDA-8B, P = 1024: 0.5 MB per KV head; an H100 has 50 MB).

*Library*: `jax.nn.dot_product_attention` for the prefix and for the suffix, merged by their log-sum-exps. If there is
only one prefix, all rows are folded into its queries, so it is read once. This has two costs. The library transposes KV
to `[..., P, K, H]` first, which copies the layer's prefix in every call. And it rounds the log-sum-exps to the queries'
dtype: in bfloat16 an error of up to 1/64 at 4 < |lse| < 8, which shifts weight between the parts by up to 0.4 %.

*Joined*: one call of a library for prefix and suffix (`bicache_jax.kernels.joined`).

`gpu_forms.json` says which form is used for which shapes, and why. The rooflines in `bicache_jax.kernels.tpu` apply
with the card's own ratio: an H100 (989e12 / 3.35e12 = 295 operations per byte) becomes compute-bound at about the same
shapes as a v5e.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from bicache_jax.core.numerics import precision
from bicache_jax.kernels import joined
from bicache_jax.kernels.axes import spread
from bicache_jax.kernels.tuning import device_kind, rows

UNSEEN = float(jnp.finfo(jnp.float32).min) * 0.5  # finite: with nothing seen yet, -inf - -inf would be nan
SMALLEST = 16  # the smallest dimension of a matrix product in Triton
FEW_QUERIES = 32
"""Queries of a row and KV head up to which a shape is a block of a block cache."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a call is computed; a row of `gpu_forms.json`.

    Attributes:
        form: `triton`, `library` or `joined`.
        queries: queries in a program's block, a power of two (Triton).
        keys: keys in a block, a power of two (Triton).
        warps: warps per program.
        stages: stages of the compiler's software pipeline.
        library: the implementation that `jax.nn.dot_product_attention` uses; for `joined` any of `joined.LIBRARIES`.
    """

    form: Literal["triton", "library", "joined"]
    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2
    library: Literal["xla", "cudnn", "tokamax"] = "xla"


def form_for(kind: str | None, num_queries: int, head_dim: int, dtype: Any) -> Form:
    """Looks up the form for a shape.

    Args:
        kind: device kind as JAX names it; None: not known.
        num_queries: queries per row and KV head, `N / K * T`.
        head_dim: H.
        dtype: dtype of the operands.

    Returns:
        The first row of the table that fits.
    """
    for row in rows("cuda", kind):
        limits = ((num_queries, row["max_queries"]), (head_dim, row["max_head_dim"]))
        if jnp.dtype(dtype).name in row["dtypes"] and all(not most or value <= most for value, most in limits):
            form = Form(**{field.name: row[field.name] for field in dataclasses.fields(Form) if field.name in row})
            if joined.has(form.library):  # a table may come from where more is installed
                return form
    raise NotImplementedError(f"no form serves {jnp.dtype(dtype).name} with head size {head_dim}")


def candidates(num_queries: int, head_dim: int, dtype: Any) -> list[Form]:
    """Forms that are worth timing for a shape; `form_for` describes the arguments."""
    if head_dim > 128:
        return [Form("library"), Form("joined")]
    libraries = [Form("library"), Form("joined")]
    if jnp.dtype(dtype).itemsize == 2:  # what those know that are made for it
        more: list[Literal["cudnn", "tokamax"]] = ["cudnn", "tokamax"]
        libraries += [Form("joined", library=name) for name in more if joined.has(name)]
    if jnp.dtype(dtype).itemsize > 2:
        tried = [(64, 32, 8, 1), (32, 32, 4, 2), (64, 32, 4, 2), (64, 64, 8, 1), (32, 32, 2, 2), (128, 32, 8, 1)]
    elif num_queries <= FEW_QUERIES:
        tried = [(32, 64, 2, 3), (32, 128, 4, 3), (32, 32, 2, 3), (32, 64, 4, 4), (16, 64, 4, 3)]
    else:
        tried = [(64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3), (128, 64, 4, 3), (64, 128, 4, 2)]
    return [*(Form("triton", *sizes) for sizes in tried), *libraries]


def _kernel(
    q_ref: Any,
    k_prefix_ref: Any,
    v_prefix_ref: Any,
    k_suffix_ref: Any,
    v_suffix_ref: Any,
    layer_ref: Any,
    index_ref: Any,
    prefix_len_ref: Any,
    suffix_len_ref: Any,
    valid_ref: Any,
    *refs: Any,
    form: Form,
    width: int,
    scale: float,
) -> None:
    """One block of queries of a row and KV head; `width` is H, rounded up to a power of two."""
    block, head, row = (pl.program_id(axis) for axis in range(3))
    num_queries, head_dim = q_ref.shape[-2:]
    *own_ids, out_ref = refs  # blocks of the queries, under block-causal attention
    high = precision(q_ref.dtype)
    in_head = jnp.arange(width) < head_dim
    queries = pl.ds(block * form.queries, form.queries)
    in_q = (block * form.queries + jnp.arange(form.queries) < num_queries)[:, None] & in_head
    q = plgpu.load(q_ref.at[row, head, queries, pl.ds(0, width)], mask=in_q, other=0.0)
    own = None
    if own_ids:
        there_q = block * form.queries + jnp.arange(form.queries) < num_queries
        own = plgpu.load(own_ids[0].at[row, queries], mask=there_q, other=0)[:, None]
    layer, prefix = plgpu.load(layer_ref.at[row]), plgpu.load(index_ref.at[row])

    def walk(k_ref: Any, v_ref: Any, where: tuple[Any, ...], length: Array, mask_ref: Any, carry: Any) -> Any:
        """Attends to the first `length` keys at `where`."""

        def body(step: Array, carry: Any) -> Any:
            peak, total, out = carry
            keys = pl.ds(step * form.keys, form.keys)
            there = step * form.keys + jnp.arange(form.keys) < length
            slot = (*where, keys, pl.ds(0, width))
            k = plgpu.load(k_ref.at[slot], mask=there[:, None] & in_head, other=0.0)
            if mask_ref is None:
                seen = there
            elif own is None:
                seen = there & (plgpu.load(mask_ref.at[row, keys], mask=there, other=0) != 0)
            else:
                seen = there & (plgpu.load(mask_ref.at[row, keys], mask=there, other=0) <= own)
            scores = jnp.where(seen, plgpu.dot(q, k.T, precision=high) * (scale * math.log2(math.e)), UNSEEN)
            higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
            shrink, weights = jnp.exp2(peak - higher), jnp.exp2(scores - higher[:, None])
            if mask_ref is not None and own is not None:  # a query may see none of these keys
                weights = jnp.where(seen, weights, 0)
            v = plgpu.load(v_ref.at[slot], mask=there[:, None] & in_head, other=0.0)
            out = shrink[:, None] * out + plgpu.dot(weights.astype(v.dtype), v, precision=high)
            return higher, shrink * total + jnp.sum(weights, axis=-1), out

        return jax.lax.fori_loop(0, jax.lax.div(length + (form.keys - 1), form.keys), body, carry)

    carry = (
        jnp.full(form.queries, UNSEEN, jnp.float32),
        jnp.zeros(form.queries, jnp.float32),
        jnp.zeros((form.queries, width), jnp.float32),
    )
    carry = walk(k_prefix_ref, v_prefix_ref, (layer, prefix, head), plgpu.load(prefix_len_ref.at[row]), None, carry)
    suffix_len = plgpu.load(suffix_len_ref.at[row])
    _, total, out = walk(k_suffix_ref, v_suffix_ref, (row, head), suffix_len, valid_ref, carry)
    out = out / jnp.where(total == 0, 1, total)[:, None]
    plgpu.store(out_ref.at[row, head, queries, pl.ds(0, width)], out.astype(out_ref.dtype), mask=in_q)


def _triton(
    q: Array,
    k_prefix: Array,
    v_prefix: Array,
    k_suffix: Array,
    v_suffix: Array,
    index: Array,
    prefix_len: Array,
    suffix_valid: Array,
    block_ids: tuple[Array, Array] | None,
    layer: Array,
    scale: float,
    form: Form,
    interpret: bool,
) -> Array:
    num_rows, num_heads, num_queries, head_dim = q.shape
    num_kv_heads, num_suffix = k_suffix.shape[1:3]
    _, num_prefixes, _, num_prefix, _ = k_prefix.shape
    folded = num_heads // num_kv_heads * num_queries
    form = dataclasses.replace(form, queries=min(form.queries, max(SMALLEST, pl.next_power_of_2(folded))))
    seen = jnp.where(suffix_valid, jnp.arange(num_suffix) + 1, 0)
    scalars = (
        jnp.broadcast_to(layer, index.shape),
        index,
        jnp.clip(prefix_len[index], 0, num_prefix),
        jnp.max(seen, axis=1, initial=0),
        suffix_valid,
    )
    own_ids = []
    if block_ids is not None and num_suffix:
        own_ids = [jnp.tile(block_ids[0], (1, num_heads // num_kv_heads)).astype(jnp.int32)]
        scalars = (*scalars[:-1], jnp.where(suffix_valid, block_ids[1], jnp.iinfo(jnp.int32).max))

    def at_least_one(array: Array) -> Array:
        """A non-empty array to point to; it is not read if there are no keys."""
        return array if array.shape[-2] else jnp.zeros((*array.shape[:-2], 1, head_dim), array.dtype)

    kv = (at_least_one(array) for array in (k_prefix, v_prefix, k_suffix, v_suffix))
    operands, axes = spread(
        [
            q.reshape(num_rows, num_kv_heads, folded, head_dim),
            *kv,
            *(scalar.astype(jnp.int32) for scalar in scalars[:-1]),
            (scalars[-1] if num_suffix else jnp.zeros((num_rows, 1))).astype(jnp.int32),
            *own_ids,
        ]
    )
    out = pl.pallas_call(
        functools.partial(_kernel, form=form, width=max(SMALLEST, pl.next_power_of_2(head_dim)), scale=scale),
        grid=(-(-folded // form.queries), num_kv_heads, num_rows),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_kv_heads, folded, head_dim), q.dtype, manual_axis_type=axes),
        compiler_params=plgpu.CompilerParams(num_warps=form.warps, num_stages=form.stages),
        interpret=interpret,
        name="prefix_attention",
    )(*operands)
    return out.reshape(q.shape)


def _part(q: Array, k: Array, v: Array, mask: Array, scale: float, library: Any) -> tuple[Array, Array]:
    """Attention `[B, N, T, H]` over one part of the keys, and its log-sum-exp; -inf where no key is valid.

    The mask is [B, S], or [B, T, S] where queries see different keys.
    """
    mask = mask if mask.ndim == 3 else mask[:, None]
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        out, lse = jax.nn.dot_product_attention(
            q, k, v, mask=mask[:, None], scale=scale, implementation=library, return_residual=True
        )
    lse = jnp.where(jnp.any(mask, axis=-1)[:, None], lse.swapaxes(1, 2).astype(jnp.float32), -jnp.inf)
    return out.swapaxes(1, 2).astype(jnp.float32), lse


def _library(
    q: Array,
    k_prefix: Array,
    v_prefix: Array,
    k_suffix: Array,
    v_suffix: Array,
    index: Array | None,
    prefix_len: Array,
    suffix_valid: Array,
    block_ids: tuple[Array, Array] | None,
    layer: Array,
    scale: float,
    form: Form,
) -> Array:
    num_rows, num_heads, num_queries, head_dim = q.shape
    k_prefix, v_prefix = (jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in (k_prefix, v_prefix))
    num_prefixes, _, num_prefix, _ = k_prefix.shape
    parts = []
    if num_prefix:
        asking = q
        if num_prefixes == 1:
            asking = q.swapaxes(0, 1).reshape(1, num_heads, num_rows * num_queries, head_dim)
        elif index is not None:
            k_prefix, v_prefix, prefix_len = k_prefix[index], v_prefix[index], prefix_len[index]
        mask = jnp.arange(num_prefix) < prefix_len[:, None]
        out, lse = _part(asking, k_prefix, v_prefix, mask, scale, form.library)
        if num_prefixes == 1:
            out = out.reshape(num_heads, num_rows, num_queries, head_dim).swapaxes(0, 1)
            lse = lse.reshape(num_heads, num_rows, num_queries).swapaxes(0, 1)
        parts.append((out, lse))
    if k_suffix.shape[2]:
        seen = suffix_valid
        if block_ids is not None:
            seen = seen[:, None] & (block_ids[1][:, None] <= block_ids[0][..., None])
        parts.append(_part(q, k_suffix, v_suffix, seen, scale, form.library))
    peak = jnp.maximum(functools.reduce(jnp.maximum, (lse for _, lse in parts)), UNSEEN)
    shares = [jnp.exp(lse - peak) for _, lse in parts]
    total = functools.reduce(jnp.add, shares)
    out = functools.reduce(jnp.add, (s[..., None] * out for s, (out, _) in zip(shares, parts, strict=True)))
    return (out / jnp.where(total == 0, 1, total)[..., None]).astype(q.dtype)


def prefix_attention(
    q: Float[Array, "B N T H"],
    k_prefix: Float[Array, "*L G K P H"],
    v_prefix: Float[Array, "*L G K P H"],
    k_suffix: Float[Array, "B K S H"],
    v_suffix: Float[Array, "B K S H"],
    *,
    prefix_index: Int[Array, " B"] | None = None,
    prefix_len: Int[Array, " G"],
    suffix_valid: Bool[Array, "B S"],
    block_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    scale: float | None = None,
    layer: Int[Array, ""] | int | None = None,
    form: Form | None = None,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """`bicache_jax.core.attention.prefix_attention` on NVIDIA GPUs; arguments and result are described there.

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
        form: how to compute the call; None: looked up in the table.
        interpret: run the Triton kernel in Pallas's interpreter.

    Returns:
        Attended values.
    """
    num_heads, num_queries, head_dim = q.shape[1:]
    num_kv_heads, num_suffix = k_suffix.shape[1:3]
    num_prefixes, num_prefix = k_prefix.shape[-4], k_prefix.shape[-2]
    if not q.size or not (num_prefix or num_suffix):
        return jnp.zeros_like(q)
    form = form or form_for(device_kind("cuda"), num_heads // num_kv_heads * num_queries, head_dim, q.dtype)
    if layer is None:
        k_prefix, v_prefix, layer = k_prefix[None], v_prefix[None], 0
    layer = jnp.clip(jnp.asarray(layer, jnp.int32), 0, k_prefix.shape[0] - 1)
    index = None if prefix_index is None else jnp.clip(prefix_index, 0, num_prefixes - 1)
    scale = head_dim**-0.5 if scale is None else scale
    with jax.named_scope("prefix_attention"):
        arrays = (q, k_prefix, v_prefix, k_suffix, v_suffix)
        if form.form == "joined" and block_ids is not None:  # lengths do not say who sees what
            form = Form("library")
        if form.form == "library":
            return _library(*arrays, index, prefix_len, suffix_valid, block_ids, layer, scale, form)
        index = jnp.arange(q.shape[0]) if index is None else index
        if form.form == "joined":
            return joined.prefix_attention(*arrays, index, prefix_len, suffix_valid, layer, scale, form.library)
        return _triton(*arrays, index, prefix_len, suffix_valid, block_ids, layer, scale, form, bool(interpret))
