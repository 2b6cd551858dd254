"""The functional layer for JAX programs: two pure functions, jittable and shardable.

`encode_prefix` runs a prefix once; `denoise` runs rows of suffixes over it. The engine is built from the same programs
and adds files, grouping and buckets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bicache_jax.core.backbone import Backbone, Params, layer_params
from bicache_jax.core.cache import PrefixCache, Rows
from bicache_jax.core.config import BlockCache, CacheConfig, ModelConfig, SamplingConfig
from bicache_jax.core.numerics import precision
from bicache_jax.decoding.encode import encode
from bicache_jax.decoding.interval import empty_suffix, intervals
from bicache_jax.decoding.schedule import make_decoding, most_steps, stages
from bicache_jax.wiring import backbone_for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoised:
    """What `denoise` returns.

    Attributes:
        tokens: the response of each row.
        steps: denoising steps made.
        forward_passes: forward passes made.
    """

    tokens: Int[Array, "B R"]
    steps: Int[Array, " B"]
    forward_passes: Int[Array, " B"]


def encode_prefix(
    params: Params,
    config: ModelConfig,
    prefix_ids: Int[Array, "*G P"],
    *,
    prefix_len: Int[Array, " G"] | None = None,
    boundaries: Sequence[int] | None = None,
    attention: str = "auto",
) -> PrefixCache:
    """Encodes prefixes alone.

    Args:
        params: parameters of the model.
        config: its architecture (static under `jit`).
        prefix_ids: tokens of one prefix [P], or of G padded ones [G, P]; P may be 0 (no prefix).
        prefix_len: tokens of each prefix; None: all P.
        boundaries: boundaries that rows will use; None: any, at the price of keeping every layer's input.
        attention: implementation of prefix attention.

    Returns:
        The cache; immutable, usable by any number of `denoise` calls.

    Raises:
        ValueError: a boundary is outside 0..L.
    """
    prefix_ids = jnp.asarray(prefix_ids, jnp.int32)
    prefix_ids = prefix_ids[None] if prefix_ids.ndim == 1 else prefix_ids
    num_layers = config.num_layers
    wanted = range(num_layers) if boundaries is None else sorted(set(boundaries))
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= num_layers:
        raise ValueError(f"boundaries must lie in 0..{num_layers}, got {list(wanted)}")
    inputs = sorted({min(b, num_layers - 1) for b in wanted})
    if prefix_len is None:
        prefix_len = jnp.full(prefix_ids.shape[:1], prefix_ids.shape[1], jnp.int32)
    return encode(
        backbone_for(config, attention),
        params,
        prefix_ids,
        jnp.asarray(prefix_len, jnp.int32),
        jnp.asarray(inputs, jnp.int32),
        num_layers=inputs[-1] + 1,
    )


def denoise(
    params: Params,
    config: ModelConfig,
    prefix: PrefixCache,
    canvas: Int[Array, "B U"],
    boundary: Int[Array, ""] | int,
    sampling: SamplingConfig,
    key: Key[Array, "*B"],
    *,
    refresh_interval: Int[Array, ""] | int | Literal["auto"] = "auto",
    block_cache: BlockCache = "off",
    prefix_index: Int[Array, " B"] | None = None,
    canvas_len: Int[Array, " B"] | None = None,
    attention: str = "auto",
) -> Denoised:
    """Denoises the responses of B rows over cached prefixes.

    Args:
        params: parameters of the model.
        config: its architecture (static under `jit`).
        prefix: from `encode_prefix`; `boundary` must be among the boundaries it was made for.
        canvas: suffix of each row in reading order, `[rest of the prompt | response]`, then padding: the last
            `sampling.gen_length` of a row's `canvas_len` tokens are its response. They are taken as masks.
            Under guidance rows also run behind a prompt of masks, their prefix being encoded here.
        boundary: b, 0..L; layers below it reuse the prefix-alone KV. May be traced.
        sampling: decoding settings (static under `jit`).
        key: one noise key per row [B], or one key that is folded with the row number.
        refresh_interval: N in denoising steps; `auto` as in `CacheConfig`. May be traced.
        block_cache: block cache (static); see `CacheConfig`.
        prefix_index: prefix of each row; None: the only prefix for all, or row i's is prefix i.
        canvas_len: tokens of each row's canvas; None: all U.
        attention: implementation of prefix attention.

    Returns:
        The responses [B, gen_length] and the work they took.

    Raises:
        ValueError: shapes do not fit each other.
    """
    num_rows, length = canvas.shape
    num_prefixes = prefix.length.shape[0]
    gen_length = sampling.gen_length
    front = int(config.shift_logits)
    if length < gen_length + front:
        raise ValueError(f"canvas must hold gen_length={gen_length} response tokens (+{front}), got U={length}")
    if prefix_index is None:
        if num_prefixes not in (1, num_rows):
            raise ValueError(f"prefix_index is needed for {num_rows} rows over {num_prefixes} prefixes")
        prefix_index = jnp.zeros(num_rows, jnp.int32) if num_prefixes == 1 else jnp.arange(num_rows)
    canvas_len = jnp.full((num_rows,), length) if canvas_len is None else jnp.asarray(canvas_len)
    rows = _layout_rows(config, prefix, canvas, canvas_len, gen_length, jnp.asarray(prefix_index), key)
    backbone = backbone_for(config, attention)
    if sampling.guided:
        prefix, rows = _with_twins(backbone, params, prefix, rows)
    state = (rows, empty_suffix(config, rows.tokens.shape, prefix.k.dtype, block_cache=block_cache != "off"))
    if isinstance(refresh_interval, str):
        refresh_interval = CacheConfig(block_cache=block_cache).interval(sampling)
    decoding = make_decoding(config, sampling, boundary, refresh_interval, block_cache=block_cache)
    for window, stop_block in stages(sampling, block_cache):
        state = intervals(
            backbone,
            params,
            prefix,
            state,
            decoding,
            jnp.asarray(most_steps(sampling)),
            jnp.asarray(stop_block),
            block_width=sampling.block_size,
            deep_layers=config.num_layers - 1,
            window=window,
            guided=sampling.guided,
        )
    finished = jax.tree.map(lambda leaf: leaf[:num_rows], state[0])
    return Denoised(finished.tokens[:, front : front + gen_length], finished.step, finished.forward_passes)


def _layout_rows(
    config: ModelConfig,
    prefix: PrefixCache,
    canvas: Array,
    canvas_len: Array,
    gen_length: int,
    prefix_index: Array,
    key: Array,
) -> Rows:
    """Turns reading order into `[last prompt token? | response | rest | padding]`."""
    num_rows, length = canvas.shape
    front = int(config.shift_logits)
    place = jnp.arange(length)
    rest = (canvas_len - gen_length - front)[:, None]
    source = jnp.where(place < front + gen_length, rest + place, place - front - gen_length)
    source = jnp.where(place < canvas_len[:, None], source, place)
    tokens = jnp.take_along_axis(canvas, source, axis=1)
    response = (place >= front) & (place < front + gen_length)
    counter = jnp.zeros(num_rows, jnp.int32)
    return Rows(
        tokens=jnp.where(response, config.mask_id, tokens).astype(jnp.int32),
        positions=(prefix.length[prefix_index][:, None] + source).astype(jnp.int32),
        valid=place < canvas_len[:, None],
        prefix_index=prefix_index.astype(jnp.int32),
        key=jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_rows)) if key.ndim == 0 else key,
        step=counter,
        block=counter,
        block_step=counter,
        done=jnp.zeros(num_rows, bool),
        forward_passes=counter,
    )


def _with_twins(backbone: Backbone, params: Params, prefix: PrefixCache, rows: Rows) -> tuple[PrefixCache, Rows]:
    """Prefixes and rows, and behind them what guidance compares them with: as many masks for each prompt."""
    num_prefixes = prefix.length.shape[0]
    masks = jnp.full((num_prefixes, prefix.k.shape[-2]), backbone.config.mask_id, jnp.int32)
    other = encode(backbone, params, masks, prefix.length, prefix.boundaries, num_layers=prefix.k.shape[0])
    both = PrefixCache(
        k=jnp.concatenate([prefix.k, other.k], axis=1),
        v=jnp.concatenate([prefix.v, other.v], axis=1),
        hidden=jnp.concatenate([prefix.hidden, other.hidden], axis=1),
        boundaries=prefix.boundaries,
        length=jnp.concatenate([prefix.length, other.length]),
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
    attention: str = "auto",
) -> Float[Array, "B S V"]:
    """Logits of whole sequences in one bidirectional pass, float32, as the head gives them (not shifted).

    Meant for checks and small inputs: it holds the logits of every position.

    Args:
        params: parameters of the model.
        config: its architecture.
        ids: tokens.
        valid: False for padding; None: all valid.
        attention: implementation of prefix attention.

    Returns:
        Logits of every position.
    """
    backbone = backbone_for(config, attention)
    num_rows, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    valid = jnp.ones(ids.shape, bool) if valid is None else valid
    x = backbone.embed(params, ids)
    empty = jnp.zeros((num_rows, config.num_kv_heads, 0, config.head_dim), x.dtype)

    def body(index: Array, x: Array) -> Array:
        layer = layer_params(params, index)
        k, v = backbone.key_value(layer, x, positions)
        q = backbone.query(layer, x, positions)
        zeros = jnp.zeros((num_rows,), jnp.int32)
        attended = backbone.attention(q, empty, empty, k, v, prefix_len=zeros, suffix_valid=valid)
        return backbone.finish(layer, x, attended)

    x = backbone.final_norm(params, jax.lax.fori_loop(0, config.num_layers, body, x))
    head_vd, bias_v = backbone.head(params)
    logits = jnp.einsum("bsd,vd->bsv", x, head_vd, precision=precision(x.dtype), preferred_element_type=jnp.float32)
    return logits if bias_v is None else logits + bias_v.astype(jnp.float32)
