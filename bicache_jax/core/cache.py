"""The pytrees that travel through the jitted programs; all frozen, none ever changed in place.

Layout `[..., K, P, H]`, heads before tokens: a layer's KV are read by head as contiguous `[P, H]` tiles. Keys are
cached after rotary embedding, since a prefix's positions never move.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """What G prefixes leave behind when each is encoded alone.

    Attributes:
        k: rotated keys of layers 0.. (as many as the largest boundary in use needs, `b + 1`).
        v: values of the same layers.
        hidden: hidden states in front of the layers in `boundaries`.
        boundaries: the layers whose input is kept; L marks an unused slot.
        length: tokens of each prefix; the rest of P is padding.
    """

    k: Float[Array, "Ls G K P H"]
    v: Float[Array, "Ls G K P H"]
    hidden: Float[Array, "J G P D"]
    boundaries: Int[Array, " J"]
    length: Int[Array, " G"]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def hidden_at(self, boundary: Int[Array, ""] | int) -> Float[Array, "G P D"]:
        """Hidden states in front of layer `boundary`, which must be one of `boundaries`."""
        slot = jnp.argmax(self.boundaries == boundary)
        return jax.lax.dynamic_index_in_dim(self.hidden, slot, keepdims=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeepCache:
    """Prefix KV of layers `b + 1 .. L - 1` per row: written by a refresh step, read until the end of its interval.

    Attributes:
        k: rotated keys; slot i holds layer `b + 1 + i`.
        v: values of the same layers.
    """

    k: Float[Array, "Ld B K P H"]
    v: Float[Array, "Ld B K P H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SuffixCache:
    """Suffix KV of a block cache, per row; it outlives intervals, so it travels between dispatches.

    Attributes:
        k: rotated keys of all layers; no layers (L = 0) where there is no block cache.
        v: values, likewise.
    """

    k: Float[Array, "L B K U H"]
    v: Float[Array, "L B K U H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The denoising state of B rows: tokens, counters and keys, no KV.

    A row's suffix lies as `[response | rest of the prompt | padding]` (families that shift logits:
    `[last prompt token | response | rest | padding]`). Attention sees positions only, so the order is free, and the
    response stands at the same place in every row.

    Under classifier-free guidance the second half of the rows are *twins* of the first: the same response behind a
    prompt of masks, and behind a prefix of as many masks as the row's own prefix has tokens, cached like any other.

    Attributes:
        tokens: suffix tokens in that order.
        positions: position of each suffix token in the whole sequence.
        valid: False for padding.
        prefix_index: the prefix (of the batch's G) that the row uses.
        key: noise key of the request.
        step: denoising steps made since the row began; the refresh counter.
        block: current block; that of the end where a row is complete, an earlier one where it stopped early.
        block_step: denoising steps made in the current block.
        done: the response is complete, or the row is padding.
        forward_passes: forward passes made for the row.
        failed: the row met logits that are not finite, and was ended.
    """

    tokens: Int[Array, "B U"]
    positions: Int[Array, "B U"]
    valid: Bool[Array, "B U"]
    prefix_index: Int[Array, " B"]
    key: Key[Array, " B"]
    step: Int[Array, " B"]
    block: Int[Array, " B"]
    block_step: Int[Array, " B"]
    done: Bool[Array, " B"]
    forward_passes: Int[Array, " B"]
    failed: Bool[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What travels from one dispatch of the decode program to the next, and is donated to it.

    Attributes:
        rows: the rows.
        deep: the rows' deep prefix KV, of use while an interval goes on.
        suffix: their suffix KV where there is a block cache.
        index: the step of the refresh interval that comes next; 0 refreshes. One for each data shard.
    """

    rows: Rows
    deep: DeepCache
    suffix: SuffixCache
    index: Int[Array, " S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """How a token is drawn from a position's logits, all of it traced.

    Attributes:
        scale: factor of the logits.
        noise: factor of the Gumbel noise that is added to the scaled logits; 0 draws none.
        top_p: share of the probability that the kept tokens hold; 1 keeps all.
        top_k: tokens that are kept; V or more keeps all.
        guidance: factor w + 1 of the difference that the prompt makes; 1 where rows run once.
        ban_eos: whether end-of-text tokens are never drawn.
        defer_eos: whether end-of-text and end-of-turn tokens have no confidence.
    """

    scale: Float[Array, ""]
    noise: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    guidance: Float[Array, ""]
    ban_eos: Bool[Array, ""]
    defer_eos: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """What the rows of a batch share, all of it traced: changing a value never compiles anew.

    Attributes:
        boundary: b.
        refresh_interval: N.
        num_blocks: blocks of the response.
        block_length: tokens of a block.
        counts: tokens that each step of a block unmasks; behind the last one padding.
        bars: noise that a token must exceed in each step, where chance alone unmasks it; else infinite.
        draw: how tokens are drawn.
        remasking: index into `bicache_jax.decoding.rules.RULES`.
        alg_temperature: temperature of the order in which tokens are unmasked; 0: by rank.
        threshold: probability from which a token is unmasked at once; infinite where the schedule decides.
        factor: what the n-th most probable token may lack of the threshold, times n + 1; 0 but for the factor rule.
        early_stop: whether a row ends with the first block that holds an end-of-text token.
        anchor: whether a block's first token is fixed by the pass at the block's start (Dream with a block cache).
        dual: whether a block cache freezes what lies behind the block, too.
    """

    boundary: Int[Array, ""]
    refresh_interval: Int[Array, ""]
    num_blocks: Int[Array, ""]
    block_length: Int[Array, ""]
    counts: Int[Array, " steps"]
    bars: Float[Array, " steps"]
    draw: Draw
    remasking: Int[Array, ""]
    alg_temperature: Float[Array, ""]
    threshold: Float[Array, ""]
    factor: Float[Array, ""]
    early_stop: Bool[Array, ""]
    anchor: Bool[Array, ""]
    dual: Bool[Array, ""]
