"""One denoising step: chooses tokens in each row's current block and advances the row's counters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.core.cache import Decoding, Rows
from bicache_jax.core.config import MOST_EDITS
from bicache_jax.core.layout import in_response
from bicache_jax.decoding.head import choose, guide
from bicache_jax.decoding.rules import by_confidence, order, ranks


def unmask(
    backbone: Backbone,
    params: Params,
    hidden_bwd: Float[Array, "B W D"],
    rows: Rows,
    decoding: Decoding,
    active: Bool[Array, " B"],
    *,
    guided: bool = False,
) -> Rows:
    """Unmasks a step's tokens in each row's current block and advances the row's counters.

    A row is stopped if the logits of a candidate position are not finite, since any token would be meaningless.

    Args:
        backbone: the model (static).
        params: its parameters.
        hidden_bwd: hidden states that predict the block's positions, before the final norm.
        rows: the rows.
        decoding: settings that they share.
        active: rows that take part; the others stay as they are.
        guided: whether the second half of the rows are twins, under classifier-free guidance (static).

    Returns:
        The rows after the step.
    """
    x = backbone.final_norm(params, hidden_bwd)
    if not guided:
        return _unmask(backbone, params, x, rows, decoding, active)
    half = rows.tokens.shape[0] // 2
    twins = jax.tree.map(lambda leaf: leaf[half:], rows)
    rows = jax.tree.map(lambda leaf: leaf[:half], rows)
    guided_x = guide(x[:half], x[half:], decoding.draw.guidance)
    rows = _unmask(backbone, params, guided_x, rows, decoding, active[:half])
    twins = dataclasses.replace(
        rows,
        tokens=jnp.where(in_response(rows), rows.tokens, twins.tokens),
        positions=twins.positions,
        valid=twins.valid,
        prefix_index=twins.prefix_index,
    )
    return jax.tree.map(lambda first, second: jnp.concatenate([first, second]), rows, twins)


def _unmask(
    backbone: Backbone,
    params: Params,
    x_bwd: Float[Array, "B W D"],
    rows: Rows,
    decoding: Decoding,
    active: Bool[Array, " B"],
) -> Rows:
    """`unmask` for rows without twins, from normalised hidden states."""
    config = backbone.config
    (num_rows, length), width = rows.tokens.shape, x_bwd.shape[1]
    offset = rows.block[:, None] * decoding.block_length + jnp.arange(width)
    slot = jnp.minimum(offset + rows.front[:, None], length - 1)
    tokens = jnp.take_along_axis(rows.tokens, slot, axis=1)
    in_block = (jnp.arange(width) < decoding.block_length) & active[:, None]
    in_block &= (offset >= rows.given[:, None]) & (offset < rows.end[:, None])
    candidate = (tokens == config.mask_id) & in_block
    last = rows.block == (rows.end - 1) // decoding.block_length

    token_keys, order_keys = _keys(rows, offset)
    choice = choose(
        x_bwd,
        *backbone.head(params),
        config=config,
        draw=decoding.draw,
        keys_bw=token_keys,
        axis=backbone.axis,
    )
    with jax.named_scope("unmask"):
        noise = jax.vmap(jax.vmap(jax.random.gumbel))(order_keys)
        step = jnp.minimum(rows.block_step, decoding.counts.shape[1] - 1)
        count = decoding.counts[last.astype(jnp.int32), step]
        by_chance = jnp.sum(candidate & (noise > decoding.bars[step][:, None]), axis=1)
        rank = ranks(order(decoding.remasking, choice, noise, decoding.alg_temperature), candidate)
        scheduled = candidate & (rank < (count + by_chance)[:, None])
        least = jnp.where(decoding.quota, count, 1)
        sure = by_confidence(choice, candidate, least, decoding.threshold, decoding.factor, decoding.entropy_bound)
        chosen = jnp.where(jnp.isfinite(decoding.threshold), sure, scheduled)
        source = jnp.take_along_axis(rows.source, slot, axis=1) - slot[:, :1]
        anchor = candidate & ((source < 0) | (source >= decoding.block_length))
        fixes = decoding.anchor & (rows.block_step == 0) & jnp.any(anchor, axis=1)
        chosen = jnp.where(fixes[:, None], anchor, chosen)
        edited = in_block & ~candidate & (choice.token != tokens)
        edited &= jax.nn.sigmoid(choice.log_odds) > decoding.editing
        changed = chosen | edited
        updated = rows.tokens.at[jnp.arange(num_rows)[:, None], jnp.where(changed, slot, length)].set(
            choice.token, mode="drop"
        )

        failed = jnp.any(candidate & jnp.isnan(choice.log_odds), axis=1)
        updated = jnp.where(failed[:, None], rows.tokens, updated)
        over = active & ~failed & ~jnp.any(candidate & ~chosen, axis=1)
        # Where tokens are edited, a block ends with a pass that found no mask and changed nothing.
        full = active & ~jnp.any(candidate, axis=1) & jnp.isfinite(decoding.editing)
        settled = full & (~jnp.any(edited, axis=1) | (rows.edits + 1 >= MOST_EDITS))
        over &= settled | ~jnp.isfinite(decoding.editing)
        complete, block = over & last, rows.block + over
        if config.eos_ids:
            stops = over & decoding.early_stop
            is_end = in_block & jnp.isin(jnp.take_along_axis(updated, slot, axis=1), jnp.asarray(config.eos_ids))
            updated = _close_holes(rows, updated, config.mask_id, slot, is_end & stops[:, None])
            left = in_response(rows) & (updated == config.mask_id)
            complete |= stops & ~jnp.any(left, axis=1)
            next_block = (jnp.argmax(left, axis=1) - rows.front) // decoding.block_length  # others may be full already
            block = jnp.where(stops & ~complete, next_block.astype(block.dtype), block)
        seen = {}
        if config.pad_id is not None:
            inside = (jnp.arange(length) - rows.front[:, None]) // decoding.block_length == rows.block[:, None]
            gone = over[:, None] & inside & in_response(rows) & (updated == config.pad_id)
            behind = jnp.cumsum(gone, axis=1) - gone
            seen = {"valid": rows.valid & ~gone, "positions": rows.positions - behind}
        # Under a threshold blocks take as many steps as they need, so the interval begins anew with each.
        next_step = jnp.where(over & jnp.isfinite(decoding.threshold), 0, rows.interval_step + active)
        return dataclasses.replace(
            rows,
            tokens=updated,
            step=rows.step + active,
            block=block,
            block_step=jnp.where(over, 0, rows.block_step + active),
            interval_step=jnp.where(next_step >= decoding.refresh_interval, 0, next_step),
            edits=jnp.where(over, 0, rows.edits + full),
            done=rows.done | complete | failed,
            forward_passes=rows.forward_passes + active,
            failed=rows.failed | failed,
            **seen,
        )


def _close_holes(
    rows: Rows, tokens: Int[Array, "B U"], mask_id: int, slot: Int[Array, "B W"], is_end: Bool[Array, "B W"]
) -> Int[Array, "B U"]:
    """Fills what is left of a hole behind an end of text with that token; the first one in a block counts.

    Args:
        rows: the rows.
        tokens: their suffixes.
        mask_id: the mask token.
        slot: slots of the block.
        is_end: which of them hold an end of text that closes its hole.
    """
    num_rows, length = tokens.shape
    # Later holes have higher numbers, and within a hole the first end has the highest: the maximum so far is its.
    base = (rows.hole + 1) * (length + 1)
    number = jnp.take_along_axis(base, slot, axis=1) - slot
    ends = jnp.zeros_like(tokens).at[jnp.arange(num_rows)[:, None], jnp.where(is_end, slot, length)]
    latest = jax.lax.cummax(ends.set(number.astype(tokens.dtype), mode="drop"), axis=1)
    at = base - latest  # the slot of that end, if it is in the same hole
    inside = (at >= 0) & (at < length) & in_response(rows) & (tokens == mask_id)
    end = jnp.take_along_axis(tokens, jnp.clip(at, 0, length - 1), axis=1)
    return jnp.where(inside, end, tokens)


def _keys(rows: Rows, offset_bw: Int[Array, "B W"]) -> tuple[Key[Array, "B W"], Key[Array, "B W"]]:
    """Keys of a step's positions, for tokens and for their order; they depend only on request, step and position."""

    def of_row(key: Array, step: Array, offsets: Array) -> Array:
        keys = jax.vmap(lambda at: jax.random.fold_in(jax.random.fold_in(key, step), at))(offsets)
        return jax.vmap(jax.random.split)(keys)

    keys_bw2 = jax.vmap(of_row)(rows.key, rows.step, offset_bw)
    return keys_bw2[..., 0], keys_bw2[..., 1]
