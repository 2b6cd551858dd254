"""The jitted program: k refresh intervals of a batch of rows.

An interval is one refresh step and up to N - 1 reuse steps (`bicache_jax.decoding.forward`). Deep prefix KV are born
and die inside it; what travels from one dispatch to the next is tokens, counters and keys, and the suffix KV of a block
cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.core.cache import Decoding, DeepCache, PrefixCache, Rows, SuffixCache
from bicache_jax.core.config import ModelConfig
from bicache_jax.decoding.forward import SuffixPass
from bicache_jax.decoding.unmask import idle, unmask
from bicache_jax.sharding import PER_SHARD, PREFIX, REPLICATED, STATE, on_shards, param_specs

State = tuple[Rows, SuffixCache]
Pass = tuple[Array, DeepCache, SuffixCache]
Steps = tuple[Array, Array, Rows, Pass]
Intervals = tuple[Array, Rows, DeepCache, SuffixCache]


def empty_suffix(config: ModelConfig, rows: tuple[int, ...], dtype: jnp.dtype, *, block_cache: bool) -> SuffixCache:
    """Room for the KV of a block cache of rows of shape (B, U), or the empty one that means there is none."""
    layers = config.num_layers if block_cache else 0
    shape = (layers, rows[0], config.num_kv_heads, rows[1], config.head_dim)
    return SuffixCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def intervals(
    backbone: Backbone,
    params: Params,
    cache: PrefixCache,
    state: State,
    decoding: Decoding,
    num_intervals: Int[Array, ""],
    stop_block: Int[Array, ""],
    *,
    block_width: int,
    deep_layers: int,
    window: int = 0,
    guided: bool = False,
) -> State:
    """Runs up to `num_intervals` intervals, fewer when all rows are complete.

    Args:
        backbone: the model (static).
        params: its parameters.
        cache: the G prefixes of the batch, with `decoding.boundary` among their boundaries.
        state: the B rows, and their block cache or an empty one.
        decoding: what the rows share; nothing in it is static.
        num_intervals: k, traced.
        stop_block: return at the first interval edge where every row has reached this block.
        block_width: W, positions that the head looks at; at least `decoding.block_length` (static).
        deep_layers: layers of deep KV to make room for; at least `L - 1 - b` (static).
        window: T, tokens that steps inside a block run: a block's, or with a prefix block cache all from the earliest
            row's block on; 0 without a block cache (static).
        guided: whether the second half of the rows are twins, under classifier-free guidance (static).

    Returns:
        The state at the next interval edge.
    """
    config = backbone.config
    num_rows, length = state[0].tokens.shape
    num_prefix = cache.k.shape[-2]
    front = int(config.shift_logits)
    shape = (deep_layers if num_prefix else 0, num_rows, config.num_kv_heads, num_prefix, config.head_dim)
    deep = DeepCache(k=jnp.zeros(shape, cache.k.dtype), v=jnp.zeros(shape, cache.v.dtype))
    unseen = jnp.zeros((num_rows, block_width, config.d_model), cache.k.dtype)
    last = config.num_layers - 1
    boundary = jnp.minimum(decoding.boundary, last) if shape[0] else jnp.asarray(last)

    def suffix_pass(rows: Rows, size: int) -> SuffixPass:
        """A pass over all of the suffix, or over the window of a block cache."""
        first = front + rows.block * decoding.block_length
        response_end = front + decoding.num_blocks * decoding.block_length
        behind = jnp.where(decoding.dual, first + decoding.block_length, response_end)
        start = jnp.zeros_like(first) if size == length else jnp.clip(first, 0, length - size)
        place = start[:, None] + jnp.arange(size)
        update = (place >= first[:, None]) & (place < behind[:, None])
        if size == length:  # where a block starts everything is written, also for rows that start theirs later
            update |= (rows.block_step == 0)[:, None]
        return SuffixPass(backbone, params, cache, rows, boundary, start, update)

    def block_hidden(rows: Rows, x: Float[Array, "B T D"], start: Array) -> Float[Array, "B W D"]:
        # Families that shift logits put the token before the response in front of it, so hidden states line up.
        place = rows.block[:, None] * decoding.block_length + jnp.arange(block_width) - start[:, None]
        return jnp.take_along_axis(x, jnp.clip(place, 0, x.shape[1] - 1)[..., None], axis=1)

    def run(rows: Rows, deep: DeepCache, suffix: SuffixCache, size: int, *, refresh: bool) -> Pass:
        this = suffix_pass(rows, size)
        if refresh:
            x, deep, suffix = this.refresh(deep, suffix)
        else:
            x, suffix = this.reuse(deep, suffix)
        return block_hidden(rows, x, this.start), deep, suffix

    def predict(index: Array, rows: Rows, deep: DeepCache, suffix: SuffixCache, *, refresh: bool) -> Pass:
        """The pass of a step."""
        if not window:
            return run(rows, deep, suffix, length, refresh=refresh)
        starts = jnp.any(~idle(rows, decoding, index) & (rows.block_step == 0))
        carry = (unseen, deep, suffix)
        for size, turns in ((length, starts), (window, ~starts)):  # loops of one turn or none: see SuffixPass
            carry = jax.lax.fori_loop(
                0,
                turns.astype(jnp.int32),
                lambda _, carry, size=size: run(rows, carry[1], carry[2], size, refresh=refresh),
                carry,
            )
        return carry

    def step(carry: Steps) -> Steps:
        """Unmasks by the last pass, and makes the next one if the interval has one: one copy of the head, not two."""
        index, _, rows, passed = carry
        with jax.named_scope("unmask"):
            rows, index = unmask(backbone, params, passed[0], rows, decoding, index, guided=guided), index + 1
        more = (index < decoding.refresh_interval) & ~jnp.all(idle(rows, decoding, index))

        def reuse(turn: Array, passed: Pass) -> Pass:
            # Nothing here changes with the turn. Without the barrier the compiler would take the pass out of its loop,
            # and make one behind the last step of every interval, too.
            this, _ = jax.lax.optimization_barrier((rows, turn))
            return predict(index, this, passed[1], passed[2], refresh=False)

        with jax.named_scope("reuse"):
            passed = jax.lax.fori_loop(0, more.astype(jnp.int32), reuse, passed)
        return index, more, rows, passed

    def interval(carry: Intervals) -> Intervals:
        index, rows, deep, suffix = carry
        with jax.named_scope("refresh"):
            passed = predict(jnp.asarray(0), rows, deep, suffix, refresh=True)
        begin = (jnp.asarray(0), jnp.asarray(True), rows, passed)
        _, _, rows, (_, deep, suffix) = jax.lax.while_loop(lambda carry: carry[1], step, begin)
        return index + 1, rows, deep, suffix

    def more_intervals(carry: Intervals) -> Array:
        index, rows, *_ = carry
        return (index < num_intervals) & jnp.any(~rows.done & (rows.block < stop_block))

    _, rows, _, suffix = jax.lax.while_loop(more_intervals, interval, (jnp.asarray(0), state[0], deep, state[1]))
    return rows, suffix


@functools.partial(
    jax.jit,
    static_argnames=("backbone", "block_width", "deep_layers", "window", "guided", "mesh"),
    donate_argnames=("state",),
)
def decode(
    backbone: Backbone,
    params: Params,
    cache: PrefixCache,
    state: State,
    decoding: Decoding,
    num_intervals: Int[Array, ""],
    stop_block: Int[Array, ""],
    *,
    mesh: Mesh | None = None,
    **sizes: Any,
) -> State:
    """`intervals` as a program: on one device, or a batch of its own on every data shard of a mesh.

    On a mesh rows, prefixes and (with a leading axis) `decoding` are those of all data shards, one after the other, and
    `prefix_index` counts the prefixes of the row's own shard.
    """

    def shard(params: Params, cache: PrefixCache, state: State, decoding: Decoding, *limits: Array) -> State:
        if mesh is not None:
            decoding = jax.tree.map(lambda leaf: leaf[0], decoding)
        return intervals(backbone, params, cache, state, decoding, *limits, **sizes)

    specs = (param_specs(backbone.axes, params), PREFIX, STATE, PER_SHARD, REPLICATED, REPLICATED)
    return on_shards(shard, mesh, specs, STATE)(params, cache, state, decoding, num_intervals, stop_block)
