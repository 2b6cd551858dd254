"""The pytrees that the jitted programs take and return; all are frozen and never changed in place.

KV have the layout `[..., K, P, H]`, heads before tokens: a layer's KV are read per head as contiguous `[P, H]` tiles.
Keys are cached after rotary embedding, since a prefix's positions never change. KV of prefixes may be in 8 bits
(`bicache_jax.core.kv`); those of suffixes never are.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from bicache_jax.core.kv import Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PrefixCache:
    """The encodings of G prefixes, each encoded alone.

    Attributes:
        k: rotated keys of the first layers (as many as the largest boundary in use needs, `b + 1`).
        v: values of the same layers.
        hidden: hidden states before the layers in `boundaries`.
        boundaries: layers for which the input is kept; L marks an unused slot.
        length: tokens in each prefix; the rest of P is padding.
    """

    k: Float[Array, "Ls G K P H"] | Quantized
    v: Float[Array, "Ls G K P H"] | Quantized
    hidden: Float[Array, "J G P D"]
    boundaries: Int[Array, " J"]
    length: Int[Array, " G"]

    def hidden_at(self, boundary: Int[Array, ""] | int) -> Float[Array, "G P D"]:
        """Hidden states before layer `boundary`, which must be one of `boundaries`."""
        slot = jnp.argmax(self.boundaries == boundary)
        return jax.lax.dynamic_index_in_dim(self.hidden, slot, keepdims=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DeepCache:
    """Prefix KV of layers `b + 1 .. L - 1`, per row. A refresh step writes them; later steps of its interval read them.

    Attributes:
        k: rotated keys; slot i holds layer `b + 1 + i`.
        v: values of the same layers.
    """

    k: Float[Array, "Ld B K P H"] | Quantized
    v: Float[Array, "Ld B K P H"] | Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SuffixCache:
    """Suffix KV of a block cache, per row. It lasts longer than an interval, so it is passed between dispatches.

    Attributes:
        k: rotated keys of all layers; no layers (L = 0) without a block cache.
        v: values of the same layers.
    """

    k: Float[Array, "L B K U H"]
    v: Float[Array, "L B K U H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The denoising state of B rows: tokens, counters and keys, but no KV.

    The suffix layout of a row is `[response | rest of the prompt | padding]` (families that shift logits:
    `[token before the response | response | rest | padding]`). The response is whatever is decoded, in one piece behind
    the prompt or in holes of it: attention only uses positions, so the order does not matter, and the response starts
    at the same index in every row. Under block-causal attention it is the reading order, so that what a pass runs is
    one piece: `[rest of the prompt | response | padding]`.

    Under classifier-free guidance the second half of the rows are *twins* of the first: the same response after a
    prompt of masks, and after a prefix of as many masks as the row's own prefix has tokens, cached like any other.

    Attributes:
        tokens: suffix tokens in that order.
        positions: position of each suffix token in the whole sequence.
        source: slot whose hidden state predicts each suffix token (`bicache_jax.core.layout.Slots`).
        hole: which hole of the prompt each token of the response is in; the response itself is one.
        valid: False for padding.
        front: where the first block begins in the suffix.
        given: tokens of the prompt with which it begins.
        end: tokens from there to the end of the last block; those behind the given ones are the response.
        prefix_index: the prefix (of the batch's G) that the row uses.
        key: noise key of the request.
        step: denoising steps made since the row began; the refresh counter.
        block: current block; the number of blocks if the row is complete, less if it stopped early.
        block_step: denoising steps made in the current block.
        interval_step: step of the row's refresh interval; at 0 it waits for a refresh.
        edits: passes made in the current block since it has no masks, where placed tokens may be replaced.
        done: the response is complete, or the row is padding.
        forward_passes: forward passes made for the row.
        failed: the row had logits that are not finite, and was stopped.
    """

    tokens: Int[Array, "B U"]
    positions: Int[Array, "B U"]
    source: Int[Array, "B U"]
    hole: Int[Array, "B U"]
    valid: Bool[Array, "B U"]
    front: Int[Array, " B"]
    given: Int[Array, " B"]
    end: Int[Array, " B"]
    prefix_index: Int[Array, " B"]
    key: Key[Array, " B"]
    step: Int[Array, " B"]
    block: Int[Array, " B"]
    block_step: Int[Array, " B"]
    interval_step: Int[Array, " B"]
    edits: Int[Array, " B"]
    done: Bool[Array, " B"]
    forward_passes: Int[Array, " B"]
    failed: Bool[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DecodeState:
    """The state that one dispatch of the decode program passes to the next, which receives it as a donated argument.

    Attributes:
        rows: the rows.
        deep: the rows' deep prefix KV, each valid until the end of the row's interval.
        suffix: their suffix KV if there is a block cache.
        waited: passes' worth of work that rows have lost by waiting for a dearer pass. One per data shard.
        passes: passes made so far. One per data shard.
    """

    rows: Rows
    deep: DeepCache
    suffix: SuffixCache
    waited: Float[Array, " S"]
    passes: Int[Array, " S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """How a token is drawn from a position's logits; all fields are traced.

    Attributes:
        scale: factor of the logits.
        noise: factor of the Gumbel noise added to the scaled logits; 0 adds none.
        top_p: probability mass of the tokens that are kept; 1 keeps all.
        top_k: number of tokens that are kept; V or more keeps all.
        guidance: factor w + 1 of the difference that the prompt makes; 1 without guidance.
        suppressed: tokens that count for nothing.
        ban_eos: whether end-of-text tokens are never drawn.
        defer_eos: whether end-of-text and end-of-turn tokens get no confidence.
    """

    scale: Float[Array, ""]
    noise: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    guidance: Float[Array, ""]
    suppressed: Int[Array, " X"]
    ban_eos: Bool[Array, ""]
    defer_eos: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Decoding:
    """Settings that the rows of a batch share. All are traced, so changing a value never recompiles.

    Attributes:
        boundary: b.
        refresh_interval: N.
        block_length: tokens per block.
        counts: tokens that each step of a block unmasks, padded at the end; then those of the last block.
        quota: whether these are the least that a step unmasks under a threshold; if not, one is.
        bars: noise that a token must exceed in each step if chance alone unmasks it; otherwise infinite.
        draw: how tokens are drawn.
        remasking: index into `bicache_jax.decoding.rules.RULES`.
        alg_temperature: temperature of the order in which tokens are unmasked; 0: by rank.
        threshold: probability from which a token is unmasked at once; infinite if the schedule decides.
        factor: n + 1 times how far the n-th most probable token may be below the threshold; 0 except for the factor
            rule.
        entropy_bound: nats that the tokens unmasked at once may have together; infinite except for the entropy rule.
        editing: probability above which a placed token of the block is replaced; infinite where none ever is.
        early_stop: whether a row ends with the first block that contains an end-of-text token.
        anchor: whether the pass at a block's start fixes the tokens that are predicted from outside of the block: its
            first one, and the first of each hole (Dream with a block cache).
        dual: whether a block cache also freezes the tokens after the block.
    """

    boundary: Int[Array, ""]
    refresh_interval: Int[Array, ""]
    block_length: Int[Array, ""]
    counts: Int[Array, "2 steps"]
    quota: Bool[Array, ""]
    bars: Float[Array, " steps"]
    draw: Draw
    remasking: Int[Array, ""]
    alg_temperature: Float[Array, ""]
    threshold: Float[Array, ""]
    factor: Float[Array, ""]
    entropy_bound: Float[Array, ""]
    editing: Float[Array, ""]
    early_stop: Bool[Array, ""]
    anchor: Bool[Array, ""]
    dual: Bool[Array, ""]
