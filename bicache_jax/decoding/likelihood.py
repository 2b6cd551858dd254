"""Log-probabilities of given tokens where they are masked: what likelihoods are estimated from.

A row is a text behind its prompt. It is looked at several times, with other tokens of it masked each time. The first
look is a refresh and the others reuse its deep prefix KV, just as the steps of a refresh interval do (BiCache, arXiv
2606.07571, section 4). Without a prefix cache, and under block-causal attention, there is nothing to refresh.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from bicache_jax.core.axes import vary_like
from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.core.cache import DeepCache, PrefixCache, Rows
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.layout import in_response
from bicache_jax.decoding.looks import look, room_for_deep
from bicache_jax.decoding.tiles import Head, over_tiles
from bicache_jax.sharding import DATA, PER_SHARD, PREFIX, REPLICATED, on_shards, param_specs


class TokenLogP(NamedTuple):
    """What a model says of given tokens.

    Attributes:
        log_p: log-probability of each among all tokens, the mask token too.
        top: whether no other token is more probable, the mask token aside.
    """

    log_p: Float[Array, "B W"]
    top: Bool[Array, "B W"]


class Scored(NamedTuple):
    """What a model says of the masked tokens of each look.

    Attributes:
        log_p: sum of their log-probabilities; NaN where a logit is not finite, 0 where there was no look.
        top: whether each of them is the most probable one at its place.
    """

    log_p: Float[Array, "B M"]
    top: Bool[Array, "B M"]


def token_log_p(
    x_bwd: Float[Array, "B W D"],
    tokens_bw: Int[Array, "B W"],
    head: Head,
    *,
    config: ModelConfig,
    axis: str | None = None,
) -> TokenLogP:
    """Log-probabilities of tokens, from hidden states.

    Args:
        x_bwd: normalised hidden states.
        tokens_bw: the tokens.
        head: rows of the head, their biases and scales.
        config: the architecture.
        axis: mesh axis over which the vocabulary is split; None: it is not.
    """

    def fold(ids: Array, logits: tuple[Array, ...], was: tuple[Array, ...]) -> tuple[Array, ...]:
        (found,) = logits
        peak, over, own, best = was
        top = jnp.maximum(peak, jnp.max(found, -1))
        over = jnp.exp(peak - top) * over + jnp.sum(jnp.exp(found - top[..., None]), -1)
        # A tile that overlaps the one before it shows what that has shown as -inf.
        own = jnp.maximum(own, jnp.max(jnp.where(ids == tokens_bw[..., None], found, -jnp.inf), -1))
        best = jnp.maximum(best, jnp.max(jnp.where(ids == config.mask_id, -jnp.inf, found), -1))
        return top, over, own, best

    shape = x_bwd.shape[:2]
    lowest, unseen = jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.full(shape, -jnp.inf)
    start: tuple[Array, ...] = (lowest, jnp.zeros(shape), unseen, unseen)
    peak, over, own, best = over_tiles(fold, start, (x_bwd,), head, config=config, axis=axis)
    if axis is not None:
        top, own, best = jax.lax.pmax((peak, own, best), axis)
        over, peak = jax.lax.psum(jnp.exp(peak - top) * over, axis), top
    return TokenLogP(own - (peak + jnp.log(over)), own >= best)


def log_likelihoods(
    backbone: Backbone,
    params: Params,
    cache: PrefixCache,
    rows: Rows,
    targets: Int[Array, "B W"],
    masked: Bool[Array, "B M W"],
    boundary: Int[Array, ""],
    num_looks: Int[Array, ""],
    block_length: Int[Array, ""],
    *,
    deep_layers: int,
) -> Scored:
    """Looks at every row once for each of its masks.

    Args:
        backbone: the model (static).
        params: its parameters.
        cache: the G prefixes, with `boundary` among their boundaries.
        rows: the rows at step 0.
        targets: their tokens behind the prompt, and mask tokens behind these.
        masked: the tokens that each look masks; those that are looked for.
        boundary: b.
        num_looks: looks to be made, at most M and at least one.
        block_length: tokens of a block, under block-causal attention.
        deep_layers: layers above the boundary to make room for, at least `L - 1 - b` (static).
    """
    config, width = backbone.config, targets.shape[1]
    place = jnp.arange(rows.tokens.shape[1]) - (rows.front + rows.given)[:, None]
    inside = in_response(rows)

    def one(deep: DeepCache, masked_bw: Array, *, refresh: bool) -> tuple[DeepCache, tuple[Array, Array]]:
        canvas = jnp.where(masked_bw, config.mask_id, targets)
        shown = jnp.take_along_axis(canvas, jnp.clip(place, 0, width - 1), axis=1)
        here = dataclasses.replace(rows, tokens=jnp.where(inside, shown, rows.tokens))
        x, deep = look(backbone, params, cache, here, deep, boundary, block_length, width=width, refresh=refresh)
        found = token_log_p(x, targets, backbone.head(params), config=config, axis=backbone.axis)
        return deep, (jnp.sum(jnp.where(masked_bw, found.log_p, 0), -1), jnp.all(found.top | ~masked_bw, -1))

    def turn(index: Array, carry: tuple[DeepCache, Scored], *, refresh: bool) -> tuple[DeepCache, Scored]:
        deep, found = carry
        deep, parts = one(deep, jax.lax.dynamic_index_in_dim(masked, index, axis=1, keepdims=False), refresh=refresh)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=1)
        return deep, Scored(*(put(whole, part) for whole, part in zip(found, parts, strict=True)))

    unseen = Scored(jnp.zeros(masked.shape[:2]), jnp.zeros(masked.shape[:2], bool))
    carry = vary_like((room_for_deep(config, cache, rows, deep_layers), unseen), rows)
    first = 0
    if carry[0].k.shape[0]:
        carry, first = turn(jnp.asarray(0), carry, refresh=True), 1
    return jax.lax.fori_loop(first, num_looks, functools.partial(turn, refresh=False), carry)[1]


@functools.partial(jax.jit, static_argnames=("backbone", "deep_layers", "mesh"))
def score(
    backbone: Backbone,
    params: Params,
    cache: PrefixCache,
    rows: Rows,
    targets: Int[Array, "B W"],
    masked: Bool[Array, "B M W"],
    boundary: Int[Array, " S"],
    num_looks: Int[Array, " S"],
    block_length: Int[Array, ""],
    *,
    deep_layers: int,
    mesh: Mesh | None = None,
) -> Scored:
    """`log_likelihoods` as a program: on one device, or on a mesh, where every data shard has rows of its own.

    On a mesh every process gets what all rows have: it is little, and the texts of a request may lie on several shards.
    """

    def shard(
        params: Params,
        cache: PrefixCache,
        rows: Rows,
        targets: Array,
        masked: Array,
        boundary: Array,
        num_looks: Array,
        block_length: Array,
    ) -> Scored:
        found = log_likelihoods(
            backbone,
            params,
            cache,
            rows,
            targets,
            masked,
            boundary[0],
            num_looks[0],
            block_length,
            deep_layers=deep_layers,
        )
        if mesh is None:
            return found
        return Scored(*(jax.lax.all_gather(part, DATA, axis=0, tiled=True) for part in found))

    specs = (param_specs(backbone.axes, params), PREFIX, *[PER_SHARD] * 5, REPLICATED)
    run = on_shards(shard, mesh, specs, Scored(REPLICATED, REPLICATED))  # type: ignore[arg-type]
    return run(params, cache, rows, targets, masked, boundary, num_looks, block_length)
