"""The jitted program: denoising steps of a batch of rows, in refresh intervals.

An interval is one refresh step and up to N - 1 reuse steps (`bicache_jax.decoding.forward`). Each row counts its own:
rows leave step with each other where they begin at different times, stop early, or decide by confidence. A pass that
refreshes some rows is dearer for all, so rows that are due wait for each other, for as long as waiting costs less
(`_next_pass`). What a row computes in its own steps does not depend on when they come.

A dispatch makes any number of steps and may end inside an interval: deep prefix KV and counters travel in the state, so
that how often a caller looks at the canvases never changes a token.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from bicache_jax.core.axes import vary_like
from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.cache import DecodeState, Decoding, DeepCache, PrefixCache, Rows, SuffixCache
from bicache_jax.core.config import CacheDtype, ModelConfig
from bicache_jax.core.kv import zeros
from bicache_jax.decoding.forward import SuffixForward
from bicache_jax.decoding.unmask import unmask
from bicache_jax.sharding import PER_SHARD, PREFIX, REPLICATED, STATE, on_shards, param_specs

Pass = tuple[Array, DeepCache, SuffixCache]

NO_LIMIT = 2**30
"""Steps of a dispatch that is to run to the end."""


def initial_state(
    config: ModelConfig,
    rows: Rows,
    *,
    dtype: jnp.dtype,
    prefix_len: int,
    deep_layers: int,
    block_cache: bool,
    cache_dtype: CacheDtype = "auto",
) -> DecodeState:
    """The state before the first step.

    Args:
        config: the architecture, or a shard's part of it.
        rows: the B rows.
        dtype: of suffix KV, and of prefix KV if `cache_dtype` is `auto`.
        prefix_len: P, the prefix tokens of the cache that the rows run over.
        deep_layers: layers of deep KV to make room for; at least `L - 1 - b`.
        block_cache: whether suffix KV are kept.
        cache_dtype: how prefix KV are kept.

    Returns:
        The state; its caches have no layers where there is nothing to keep.
    """
    num_rows, length = rows.tokens.shape
    heads = (num_rows, config.num_kv_heads)
    deep = (deep_layers if prefix_len else 0, *heads, prefix_len, config.head_dim)
    suffix = (config.num_layers if block_cache else 0, *heads, length, config.head_dim)
    state = DecodeState(
        rows=rows,
        deep=DeepCache(k=zeros(deep, dtype, cache_dtype), v=zeros(deep, dtype, cache_dtype)),
        suffix=SuffixCache(k=jnp.zeros(suffix, dtype), v=jnp.zeros(suffix, dtype)),
        waited=jnp.zeros((1,), jnp.float32),
        passes=jnp.zeros((1,), jnp.int32),
    )
    return vary_like(state, rows)


@functools.partial(
    jax.jit,
    static_argnames=("config", "dtype", "prefix_len", "deep_layers", "block_cache", "cache_dtype", "mesh"),
    donate_argnames=("rows",),
)
def begin(rows: Rows, *, config: ModelConfig, mesh: Mesh | None = None, **sizes: Any) -> DecodeState:
    """`initial_state` as a program: on one device, or on a mesh, where every data shard has its own rows."""
    return on_shards(lambda rows: initial_state(config, rows, **sizes), mesh, (PER_SHARD,), STATE)(rows)


class NextPass(NamedTuple):
    """What the rows' next pass is.

    Attributes:
        active: rows that make a step in it.
        renew: rows that it refreshes.
        size: which of the sizes of a pass it has.
        waited: passes lost to waiting since the last dear pass, this one included.
    """

    active: Bool[Array, " B"]
    renew: Bool[Array, " B"]
    size: Int[Array, ""]
    waited: Float[Array, " S"]


def _next_pass(
    rows: Rows,
    need: Int[Array, " B"],
    waited: Float[Array, " S"],
    boundary: Int[Array, ""],
    *,
    num_layers: int,
    prefix_len: int,
    sizes: tuple[int, ...],
) -> NextPass:
    """Decides between a dear pass, in which all rows make a step, and a cheap one, in which some wait.

    A dear pass refreshes, or runs more of the suffixes. It is made when all rows wait for it, or when waiting has cost
    as much as it costs more than a cheap pass: the rule for renting or buying, at most twice the cost of knowing what
    is to come (Karlin, Manasse, Rudolph and Sleator 1988). Costs are tokens run, by layers.

    Args:
        rows: the rows.
        need: tokens that each row's next step runs.
        waited: passes lost since the last dear pass.
        boundary: b, at most L - 1.
        num_layers: L.
        prefix_len: P where there are deep layers; 0: nothing is ever refreshed.
        sizes: tokens that a pass may run, smallest first.
    """
    alive = ~rows.done
    deep = prefix_len * (num_layers - 1 - boundary)
    renew = alive & (rows.interval_step == 0) & (deep > 0)
    waits = renew | (alive & (need > sizes[0]))
    most = jnp.max(jnp.where(waits, need, 0))
    size = jnp.sum(most > jnp.asarray(sizes[:-1], jnp.int32)).astype(jnp.int32)
    dear = jnp.where(jnp.any(renew), deep / num_layers, 0) + jnp.asarray(sizes)[size]
    patience = dear / sizes[0] - 1
    lost = waited + jnp.sum(waits) / jnp.maximum(jnp.sum(alive), 1)
    now = jnp.any(waits) & (jnp.all(waits == alive) | (lost[0] > patience))
    return NextPass(
        active=alive & (now | ~waits),
        renew=renew & now,
        size=jnp.where(now, size, 0),
        waited=jnp.where(now, 0.0, lost).astype(waited.dtype),
    )


def denoise_steps(
    backbone: Backbone,
    params: Params,
    cache: PrefixCache,
    state: DecodeState,
    decoding: Decoding,
    num_steps: Int[Array, ""],
    stop_block: Int[Array, ""],
    stop_done: Int[Array, ""],
    *,
    block_width: int,
    sizes: tuple[int, ...],
    guided: bool = False,
) -> DecodeState:
    """Makes up to `num_steps` passes, fewer when all rows are complete.

    Args:
        backbone: the model (static).
        params: its parameters.
        cache: the G prefixes of the batch, with `decoding.boundary` among their boundaries.
        state: where the rows are.
        decoding: what the rows share; nothing in it is static.
        num_steps: most passes, traced.
        stop_block: return where every row has reached this block.
        stop_done: return where so many rows are complete, padding included.
        block_width: W, positions that the head looks at; at least `decoding.block_length` (static).
        sizes: T, tokens that a pass may run, smallest first (`bicache_jax.decoding.schedule.pass_sizes`; static).
        guided: whether the second half of the rows are twins, under classifier-free guidance (static).

    Returns:
        The state after the last pass.
    """
    config = backbone.config
    num_rows, length = state.rows.tokens.shape
    kept = bool(state.suffix.k.shape[0])
    refreshable, prefix_len = bool(state.deep.k.shape[0]), state.deep.k.shape[-2]
    unseen = vary_like(jnp.zeros((num_rows, block_width, config.d_model), cache.hidden.dtype), state)
    boundary = clamp_boundary(decoding.boundary if refreshable else config.num_layers, config.num_layers)

    def fresh(rows: Rows) -> tuple[Array, Array]:
        """The part of each suffix whose KV its next step writes: slots from here, to there."""
        first, starts = rows.front + rows.block * decoding.block_length, rows.block_step == 0
        end = rows.front + rows.end
        behind = jnp.where(decoding.dual, jnp.minimum(first + decoding.block_length, end), end)
        if config.block_causal:  # the prompt, then each block once more when it is done: nothing later changes it
            before = jnp.where(rows.block > 0, first - decoding.block_length, 0)
            return jnp.where(starts, before, first), behind
        return jnp.where(starts, 0, first), jnp.where(starts, length, behind)

    def lead(rows: Rows) -> Array:
        """Slots in front of these that a step runs too, for the logits of the block's first position."""
        return jnp.where(rows.block_step > 0, config.shifted if config.block_causal else 0, 0)

    def needed(rows: Rows) -> Int[Array, " B"]:
        """Tokens that each row's next step runs."""
        begin, behind = fresh(rows)
        inside = jnp.where(rows.block_step > 0, sizes[0], length)
        return jnp.minimum(behind - begin + lead(rows) if config.block_causal and kept else inside, length)

    def suffix_forward(rows: Rows, size: int, this: NextPass) -> SuffixForward:
        """A pass over all of the suffix, or over the span of a block cache."""
        begin, behind = fresh(rows)
        if size == length:
            start = jnp.zeros_like(begin)
        elif config.block_causal:
            start = jnp.clip(begin - lead(rows), 0, length - size)
        else:
            start = jnp.clip(rows.front + rows.block * decoding.block_length, 0, length - size)
        position = start[:, None] + jnp.arange(size)
        update = (position >= begin[:, None]) & (position < behind[:, None]) & this.active[:, None]
        valid, block_ids = rows.valid, None
        if config.block_causal:
            own = jnp.floor_divide(jnp.arange(length) - rows.front[:, None], decoding.block_length)
            valid &= own <= rows.block[:, None]
            if not (kept and size == block_width):  # not only the tokens of one block
                block_ids = jnp.take_along_axis(own, position, axis=1), own
        return SuffixForward(
            backbone, params, cache, rows, jnp.asarray(boundary), start, update, this.renew, valid, block_ids
        )

    def block_hidden(rows: Rows, x: Float[Array, "B T D"], start: Array) -> Float[Array, "B W D"]:
        first = rows.front + rows.block * decoding.block_length
        slot = jnp.minimum(first[:, None] + jnp.arange(block_width), length - 1)
        source = jnp.take_along_axis(rows.source, slot, axis=1) - start[:, None]
        return jnp.take_along_axis(x, jnp.clip(source, 0, x.shape[1] - 1)[..., None], axis=1)

    def forward(rows: Rows, deep: DeepCache, suffix: SuffixCache, size: int, this: NextPass, *, refresh: bool) -> Pass:
        over = suffix_forward(rows, size, this)
        if refresh:
            x, deep, suffix = over.refresh(deep, suffix)
        else:
            x, suffix = over.reuse(deep, suffix)
        return block_hidden(rows, x, over.start), deep, suffix

    def kinds(this: NextPass) -> list[tuple[int, bool, Array]]:
        """The kinds of pass that there are: tokens that it runs, whether it refreshes, whether it is this one."""
        refreshes = jnp.any(this.renew)
        modes = ((True, refreshes), (False, ~refreshes)) if refreshable else ((False, jnp.asarray(True)),)
        dearest_first = [(size, this.size == place) for place, size in enumerate(sizes)][::-1]
        return [(size, refresh, ours & theirs) for refresh, ours in modes for size, theirs in dearest_first]

    def predict(this: NextPass, rows: Rows, deep: DeepCache, suffix: SuffixCache) -> Pass:
        """A pass. Each kind is a loop of one turn or none, whose carry is updated in place."""
        passed = (unseen, deep, suffix)
        for size, refresh, wanted in kinds(this):

            def turn(turn: Array, passed: Pass, size: int = size, refresh: bool = refresh) -> Pass:
                # Little here changes with the turn. Without the barrier the compiler would take the pass out of its
                # loop, and make it in every step.
                here, _ = jax.lax.optimization_barrier((rows, turn))
                return forward(here, passed[1], passed[2], size, this, refresh=refresh)

            with jax.named_scope("refresh" if refresh else "reuse"):
                passed = jax.lax.fori_loop(0, wanted.astype(jnp.int32), turn, passed)
        return passed

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        count, state = carry
        this = _next_pass(
            state.rows,
            needed(state.rows),
            state.waited,
            jnp.asarray(boundary),
            num_layers=config.num_layers,
            prefix_len=prefix_len if refreshable else 0,
            sizes=sizes,
        )
        hidden, deep, suffix = predict(this, state.rows, state.deep, state.suffix)
        rows = unmask(backbone, params, hidden, state.rows, decoding, this.active, guided=guided)
        return count + 1, DecodeState(rows, deep, suffix, this.waited, state.passes + 1)

    def more(carry: tuple[Array, DecodeState]) -> Array:
        count, state = carry
        under_way = ~state.rows.done & (state.rows.block < stop_block)
        return (count < num_steps) & jnp.any(under_way) & (jnp.sum(state.rows.done) < stop_done)

    count = vary_like(jnp.asarray(0), state)
    return jax.lax.while_loop(more, step, (count, state))[1]


@functools.partial(
    jax.jit, static_argnames=("backbone", "block_width", "sizes", "guided", "mesh"), donate_argnames=("state",)
)
def decode(
    backbone: Backbone,
    params: Params,
    cache: PrefixCache,
    state: DecodeState,
    decoding: Decoding,
    num_steps: Int[Array, ""],
    stop_block: Int[Array, ""],
    stop_done: Int[Array, " S"],
    *,
    mesh: Mesh | None = None,
    **sizes: Any,
) -> DecodeState:
    """`denoise_steps` as a program: on one device, or on a mesh, where every data shard has its own batch.

    On a mesh rows, prefixes, `stop_done` and (with a leading axis) `decoding` are those of all data shards, one after
    the other, and `prefix_index` counts the prefixes of the row's own shard.
    """

    def shard(
        params: Params, cache: PrefixCache, state: DecodeState, decoding: Decoding, stops: Array, *limits: Array
    ) -> DecodeState:
        if mesh is not None:
            decoding = jax.tree.map(lambda leaf: leaf[0], decoding)
        num_steps, stop_block = limits
        return denoise_steps(backbone, params, cache, state, decoding, num_steps, stop_block, stops[0], **sizes)

    specs = (param_specs(backbone.axes, params), PREFIX, STATE, PER_SHARD, PER_SHARD, REPLICATED, REPLICATED)
    run = on_shards(shard, mesh, specs, STATE)
    return run(params, cache, state, decoding, stop_done, num_steps, stop_block)
