"""The functional layer for JAX programs: two pure functions, jittable and shardable.

`encode_prefix` runs a prefix once; `denoise` runs rows of suffixes over it. The engine is built from the same programs
and adds files, grouping and buckets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from bicache_jax.core.axes import explicit_axis, on_auto_axes, vary_like, without_gradient
from bicache_jax.core.backbone import Backbone, MakeBackbone, Params, layer_params
from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.cache import PrefixCache, Rows
from bicache_jax.core.config import BlockCache, CacheConfig, CacheDtype, ModelConfig, SamplingConfig
from bicache_jax.core.kv import Quantized, dtype_of
from bicache_jax.core.layout import lay_out_canvases
from bicache_jax.core.quantized import product
from bicache_jax.decoding.encode import encode_alone
from bicache_jax.decoding.interval import NO_LIMIT, denoise_steps, initial_state
from bicache_jax.decoding.schedule import make_decoding, pass_sizes, stages
from bicache_jax.wiring import backbone_for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no truth value and no hash
class Denoised:
    """What `denoise` returns.

    Attributes:
        tokens: the response of each row.
        steps: denoising steps made.
        forward_passes: forward passes made.
        failed: rows without an answer, masks in place of tokens: their logits were not finite, or the prefixes
            were not encoded for a traced boundary.
    """

    tokens: Int[Array, "B R"]
    steps: Int[Array, " B"]
    forward_passes: Int[Array, " B"]
    failed: Bool[Array, " B"]


def encode_prefix(
    params: Params,
    config: ModelConfig,
    prefix_ids: Int[Array, "*G P"],
    *,
    prefix_len: Int[Array, " G"] | None = None,
    boundaries: Sequence[int] | None = None,
    block_length: int | None = None,
    cache_dtype: CacheDtype = "auto",
    attention: str = "auto",
    backbone: MakeBackbone | None = None,
) -> PrefixCache:
    """Encodes prefixes alone.

    Works under `jit`, `vmap` and `shard_map`, and on meshes with automatic or explicit axes: the result lies along the
    axis of the prefixes, its heads along that of the key projection.

    Args:
        params: parameters of the model.
        config: its architecture (static under `jit`).
        prefix_ids: tokens of one prefix [P], or of G padded ones [G, P]; P may be 0 (no prefix).
        prefix_len: tokens of each prefix; None: all P.
        boundaries: boundaries that rows will use; None: any, at the price of keeping every layer's input (under
            block-causal attention: L, the only one).
        block_length: tokens of a block, under block-causal attention: as the rows will have; None: the model's own. A
            prefix ends with a block.
        cache_dtype: how its keys and values are kept, and those that `denoise` makes of it for each row
            (`CacheConfig.cache_dtype`).
        attention: implementation of prefix attention.
        backbone: makes the model's pieces; None: its family does.

    Returns:
        The cache; immutable, usable by any number of `denoise` calls.

    Raises:
        ValueError: a boundary is outside 0..L, or there is no such `cache_dtype`.
        TypeError: it is differentiated.
    """
    cache_dtype = CacheConfig(cache_dtype=cache_dtype).cache_dtype
    prefix_ids = jnp.asarray(prefix_ids, jnp.int32)
    prefix_ids = prefix_ids[None] if prefix_ids.ndim == 1 else prefix_ids
    num_layers = config.num_layers
    wanted = range(num_layers) if boundaries is None else sorted(set(boundaries))
    if config.block_causal:
        wanted = [num_layers]
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= num_layers:
        raise ValueError(f"boundaries must lie in 0..{num_layers}, got {list(wanted)}")
    inputs = sorted({clamp_boundary(int(b), num_layers) for b in wanted})
    if prefix_len is None:
        prefix_len = jnp.full(prefix_ids.shape[:1], prefix_ids.shape[1], jnp.int32)
    pieces = backbone_for(config, attention, make=backbone)
    along, heads = explicit_axis(prefix_ids, 0), _head_axis(pieces, params)
    kv: Any = P(None, along, heads)
    kv = Quantized(kv, kv) if cache_dtype == "int8" else kv
    out = PrefixCache(k=kv, v=kv, hidden=P(None, along), boundaries=P(), length=P(along))  # type: ignore[arg-type]
    run = functools.partial(_encode, pieces, tuple(inputs), block_length or config.block_length, cache_dtype)
    return on_auto_axes(run, (params, prefix_ids, jnp.asarray(prefix_len, jnp.int32)), out)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _encode(
    backbone: Backbone, boundaries: tuple[int, ...], block_length: int, cache_dtype: CacheDtype, *arrays: Any
) -> PrefixCache:
    """`encode_prefix` on parameters, ids and lengths."""

    def run(*arrays: Any) -> PrefixCache:
        args = (*arrays, jnp.asarray(boundaries, jnp.int32), jnp.asarray(block_length, jnp.int32))
        layers = boundaries[-1] + 1
        return encode_alone(backbone, *vary_like(args, args), num_layers=layers, cache_dtype=cache_dtype)

    return without_gradient(run, "encode_prefix has no gradient: how far it goes is traced; see forward")(*arrays)


def denoise(
    params: Params,
    config: ModelConfig,
    prefix: PrefixCache,
    canvas: Int[Array, "B U"],
    boundary: Int[Array, ""] | int,
    sampling: SamplingConfig,
    key: Key[Array, "*B"] | UInt32[Array, "*B 2"],
    *,
    refresh_interval: Int[Array, ""] | int | Literal["auto"] = "auto",
    block_cache: BlockCache = "off",
    prefix_index: Int[Array, " B"] | None = None,
    canvas_len: Int[Array, " B"] | None = None,
    holes: Bool[Array, "B U"] | None = None,
    attention: str = "auto",
    backbone: MakeBackbone | None = None,
) -> Denoised:
    """Denoises the responses of B rows over cached prefixes.

    Works under `jit`, `vmap` and `shard_map`, and on meshes with automatic or explicit axes: the result lies along the
    axis of the rows.

    A boundary that is a number is checked here. A traced one cannot be: where `prefix` was not encoded for it,
    rows come back as `failed`, with masks for tokens; under `jax.experimental.checkify.checkify` that is an error which
    says so.

    Args:
        params: parameters of the model.
        config: its architecture (static under `jit`).
        prefix: from `encode_prefix`; `boundary` must be among the boundaries it was made for.
        canvas: suffix of each row in reading order, `[rest of the prompt | response]`, then padding: the last
            `sampling.gen_length` of a row's `canvas_len` tokens are its response. They are taken as masks.
            Under guidance rows also run behind a prompt of masks, their prefix being encoded here.
        boundary: b, 0..L; layers below it reuse the prefix-alone KV. May be traced.
        sampling: decoding settings (static under `jit`); a block cache implies a block length where they name none, as
            in `CacheConfig.with_blocks`.
        key: one noise key per row [B], or one key that is folded with the row number; `jax.random.key` or the older
            `jax.random.PRNGKey`.
        refresh_interval: N in denoising steps; `auto` as in `CacheConfig`. May be traced.
        block_cache: block cache (static); see `CacheConfig`. Under block-causal attention finished blocks are always
            kept: that is exact.
        prefix_index: prefix of each row; None: the only prefix for all, or row i's is prefix i.
        canvas_len: tokens of each row's canvas; None: all U.
        holes: places of the canvas that are decoded instead of its last `gen_length` ones (infilling), as many in every
            row, in any number of runs; what stands between and behind them is known, and seen. In families that shift
            logits a row over a prefix has a known token in front of them. Not under block-causal attention, where a
            token does not see what follows its block.
        attention: implementation of prefix attention.
        backbone: makes the model's pieces; None: its family does.

    Returns:
        The responses [B, gen_length], tokens of holes in reading order, and the work they took. A row whose traced
        `holes` are not `gen_length` places comes back as `failed`.

    Raises:
        ValueError: shapes do not fit each other, `prefix` was not encoded for `boundary`, or `holes` has another number
            of places.
        TypeError: it is differentiated.
    """
    cache = CacheConfig(block_cache=block_cache).for_model(config)
    block_cache = cache.block_cache
    sampling = cache.with_blocks(sampling, config, even=holes is None)
    if config.block_causal:
        boundary = config.num_layers
    canvas = jnp.asarray(canvas)
    if canvas.ndim != 2:
        raise ValueError(f"canvas must be [B, U], a row for each response, got shape {list(canvas.shape)}")
    num_rows, length = canvas.shape
    num_prefixes = prefix.length.shape[0]
    if holes is not None:
        holes = jnp.asarray(holes, bool)
        _check_holes(config, canvas.shape, holes, canvas_len, sampling.gen_length)
    if length < sampling.gen_length + config.shifted and holes is None:
        raise ValueError(
            f"canvas must hold gen_length={sampling.gen_length} response tokens (+{config.shifted}), got U={length}"
        )
    if prefix_index is None and num_prefixes not in (1, num_rows):
        raise ValueError(f"prefix_index is needed for {num_rows} rows over {num_prefixes} prefixes")
    if prefix_index is None:
        prefix_index = jnp.zeros(num_rows, jnp.int32) if num_prefixes == 1 else jnp.arange(num_rows)
    canvas_len = jnp.full((num_rows,), length) if canvas_len is None else jnp.asarray(canvas_len)
    _check_boundary(config, prefix, boundary)
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if isinstance(refresh_interval, str):
        refresh_interval = cache.interval(sampling)
    pieces = backbone_for(config, attention, make=backbone)
    run = functools.partial(_denoise, pieces, sampling, block_cache)
    args = (
        params,
        prefix,
        canvas,
        canvas_len,
        jnp.asarray(prefix_index, jnp.int32),
        key,
        jnp.asarray(boundary, jnp.int32),
        jnp.asarray(refresh_interval, jnp.int32),
        holes,
    )
    along = P(explicit_axis(args[2], 0))
    return on_auto_axes(run, args, Denoised(along, along, along, along))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _denoise(backbone: Backbone, sampling: SamplingConfig, block_cache: BlockCache, *arrays: Any) -> Denoised:
    """`denoise` on arguments that are arrays all."""
    run = functools.partial(_denoise_all, backbone, sampling, block_cache)
    return without_gradient(run, "denoise has no gradient: it chooses tokens; see forward")(*arrays)


def _denoise_all(backbone: Backbone, sampling: SamplingConfig, block_cache: BlockCache, *args: Any) -> Denoised:
    params, prefix, canvas, canvas_len, prefix_index, key, boundary, refresh_interval, holes = vary_like(args, args)
    config, num_rows = backbone.config, canvas.shape[0]
    known = jnp.any(prefix.boundaries == clamp_boundary(boundary, config.num_layers))
    known = (known & (boundary <= config.num_layers)) | (prefix.k.shape[-2] == 0)
    checkify.debug_check(known, "the prefixes were not encoded for boundary {boundary}", boundary=boundary)
    rows = lay_out_canvases(config, prefix.length[prefix_index], canvas, canvas_len, sampling, key, holes)
    rows = dataclasses.replace(rows, prefix_index=prefix_index, done=~known | rows.done, failed=~known | rows.failed)
    if sampling.guided:
        prefix, rows = _with_twins(backbone, params, prefix, rows, jnp.asarray(sampling.block_size, jnp.int32))
    state = initial_state(
        config,
        rows,
        dtype=prefix.hidden.dtype,
        prefix_len=prefix.k.shape[-2],
        deep_layers=0 if config.block_causal else config.num_layers - 1,
        block_cache=block_cache != "off",
        cache_dtype=dtype_of(prefix.k),
    )
    decoding = make_decoding(config, sampling, boundary, refresh_interval, block_cache=block_cache)
    for stage in stages(sampling, block_cache):
        state = denoise_steps(
            backbone,
            params,
            prefix,
            state,
            decoding,
            jnp.asarray(NO_LIMIT),
            jnp.asarray(stage.stop_block),
            jnp.asarray(NO_LIMIT),
            block_width=sampling.block_size,
            sizes=pass_sizes(config, sampling, stage.span, rows.tokens.shape[1]),
            guided=sampling.guided,
        )
    finished = jax.tree.map(lambda leaf: leaf[:num_rows], state.rows)
    slots = (finished.front + finished.given)[:, None] + jnp.arange(sampling.gen_length)
    response = jnp.take_along_axis(finished.tokens, slots, axis=1)
    return Denoised(response, finished.step, finished.forward_passes, finished.failed)


def _head_axis(backbone: Backbone, params: Params) -> Any:
    """The explicit mesh axis along which key heads lie; None where there is none, or it does not divide them."""
    heads = backbone.config.num_kv_heads
    for path, axes in (backbone.axes or {}).items():
        leaf = functools.reduce(lambda tree, key: (tree or {}).get(key), path, params)
        if "kv_heads" in axes and leaf is not None:
            axis = explicit_axis(leaf, axes.index("kv_heads"))
            if axis is not None and heads % jax.typeof(leaf).sharding.mesh.shape[axis] == 0:
                return axis
    return None


def _check_holes(config: ModelConfig, shape: tuple[int, ...], holes: Array, canvas_len: Any, gen_length: int) -> None:
    """Refuses holes that the model cannot fill, or whose known number is not that of the tokens to decode.

    Raises:
        ValueError: they are such.
    """
    if config.block_causal:
        raise ValueError("holes are for full attention: under block-causal attention a token does not see what follows")
    if holes.shape != shape:
        raise ValueError(f"holes must be {list(shape)}, as canvas is, got shape {list(holes.shape)}")
    if isinstance(holes, jax.core.Tracer) or isinstance(canvas_len, jax.core.Tracer):
        return
    lengths = np.full(shape[0], shape[1]) if canvas_len is None else np.asarray(canvas_len)
    counts = (np.asarray(holes) & (np.arange(shape[1]) < lengths[:, None])).sum(axis=1).tolist()
    if {*counts} - {gen_length}:
        raise ValueError(f"holes must have gen_length={gen_length} places in every row, got {sorted({*counts})}")


def _check_boundary(config: ModelConfig, prefix: PrefixCache, boundary: Any) -> None:
    """Refuses a boundary whose value is known if the prefixes were not encoded for it.

    Raises:
        ValueError: it is outside 0..L, or the prefixes were not encoded for it.
    """
    if isinstance(boundary, jax.core.Tracer):
        return
    boundary = int(np.asarray(boundary))
    if not 0 <= boundary <= config.num_layers:
        raise ValueError(f"boundary must lie in 0..{config.num_layers}, got {boundary}")
    if isinstance(prefix.boundaries, jax.core.Tracer) or not prefix.k.shape[-2]:
        return
    # In NumPy: inside a trace, jax would trace what is done with the numbers, known or not.
    encoded = sorted(set(np.asarray(prefix.boundaries).tolist()))
    if clamp_boundary(boundary, config.num_layers) not in encoded:
        listed = ", ".join(str(b) for b in encoded if b < config.num_layers)
        raise ValueError(
            f"the prefixes were not encoded for boundary {boundary}, only for {listed}: "
            f"encode_prefix(..., boundaries=[{boundary}])"
        )


def _with_twins(
    backbone: Backbone, params: Params, prefix: PrefixCache, rows: Rows, block_length: Int[Array, ""]
) -> tuple[PrefixCache, Rows]:
    """Prefixes and rows, followed by what guidance compares them with: as many masks for each prompt."""
    num_prefixes = prefix.length.shape[0]
    masks = vary_like(jnp.full((num_prefixes, prefix.k.shape[-2]), backbone.config.mask_id, jnp.int32), rows)
    other = encode_alone(
        backbone,
        params,
        masks,
        prefix.length,
        prefix.boundaries,
        block_length,
        num_layers=prefix.k.shape[0],
        cache_dtype=dtype_of(prefix.k),
    )

    def joined(name: str, axis: int) -> Any:
        parts = getattr(prefix, name), getattr(other, name)
        return jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=axis), *parts)

    both = PrefixCache(
        k=joined("k", 1),
        v=joined("v", 1),
        hidden=joined("hidden", 1),
        boundaries=prefix.boundaries,
        length=joined("length", 0),
    )
    twins = dataclasses.replace(
        rows,
        tokens=jnp.full_like(rows.tokens, backbone.config.mask_id),
        prefix_index=rows.prefix_index + num_prefixes,
    )
    return both, jax.tree.map(lambda first, second: jnp.concatenate([first, second]), rows, twins)


def forward(
    params: Params,
    config: ModelConfig,
    ids: Int[Array, "B S"],
    *,
    valid: Bool[Array, "B S"] | None = None,
    block_length: int | None = None,
    attention: str = "auto",
    backbone: MakeBackbone | None = None,
) -> Float[Array, "B S V"]:
    """Logits of whole sequences in one pass, float32, as the head gives them (not shifted).

    Meant for checks and small inputs: it holds the logits of every position.

    Args:
        params: parameters of the model.
        config: its architecture.
        ids: tokens.
        valid: False for padding; None: all valid.
        block_length: tokens of a block under block-causal attention, counted from the first token; None: the model's
            own.
        attention: implementation of prefix attention.
        backbone: makes the model's pieces; None: its family does.

    Returns:
        Logits of every position.

    Raises:
        ValueError: `ids` is not [B, S].
    """
    ids = jnp.asarray(ids)
    if ids.ndim != 2:
        raise ValueError(f"ids must be [B, S], a row for each sequence, got shape {list(ids.shape)}")
    pieces = backbone_for(config, attention, make=backbone)
    valid = jnp.ones(ids.shape, bool) if valid is None else valid
    out = P(explicit_axis(jnp.asarray(ids), 0))
    run = functools.partial(_forward, pieces, block_length or config.block_length)
    return on_auto_axes(run, (params, ids, valid), out)


def _forward(backbone: Backbone, block_length: int, params: Params, ids: Array, valid: Array) -> Array:
    config, (num_rows, length) = backbone.config, ids.shape
    params, ids, valid = vary_like((params, ids, valid), (params, ids, valid))
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    x = backbone.embed(params, ids, positions)
    empty = jnp.zeros((num_rows, config.num_kv_heads, 0, config.head_dim), x.dtype)
    block_ids = (positions // block_length, positions // block_length) if config.block_causal else None

    def body(index: Array, x: Array) -> Array:
        layer = layer_params(params, index)
        k, v = backbone.key_value(layer, x, positions)
        q = backbone.query(layer, x, positions)
        zeros = jnp.zeros((num_rows,), jnp.int32)
        attended = backbone.attention(q, empty, empty, k, v, prefix_len=zeros, suffix_valid=valid, block_ids=block_ids)
        return backbone.finish(layer, x, attended)

    x = backbone.final_norm(params, jax.lax.fori_loop(0, config.num_layers, body, x))
    head_vd, bias_v, scale_v = backbone.head(params)
    logits = product(x, head_vd, scale_v, out_first=True, quantize=config.quantize, dtype=jnp.float32)
    return logits if bias_v is None else logits + bias_v.astype(jnp.float32)
