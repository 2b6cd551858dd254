"""Forward passes over the suffixes of a batch, split at a dynamic layer boundary.

An interval has two kinds of step (BiCache, arXiv 2606.07571, section 4):

* refresh: layers `< b` run on suffix tokens against the shared prefix-alone KV. Before layer b the prefix-alone hidden
  states are added, and layers `>= b` run on the whole sequence. The prefix KV they compute are kept per row.
* reuse: suffix tokens only, against the shared KV in layers `<= b` and the row's own KV above.

Three savings are exact and do not change a token. The prefix input of layer b is the prefix-alone hidden state, so its
prefix KV (and queries) are shared too. In layer L - 1 the prefix only needs K and V. So b = L - 1 is the same as b = L:
no deep layer is left. Running without a prefix cache is the same program with P = 0.

A pass runs a *span* of each suffix. Without a block cache that is the whole suffix. With one (Fast-dLLM, arXiv
2505.22618) the span is the current block, or the current block and everything after it. The KV of the rest are in a
`SuffixCache`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bicache_jax.core.backbone import Backbone, Params, layer_params
from bicache_jax.core.cache import DeepCache, PrefixCache, Rows, SuffixCache
from bicache_jax.core.kv import KV, dtype_of, stored

Carry = tuple[Array, SuffixCache]
DeepCarry = tuple[Array, DeepCache, SuffixCache]


@dataclasses.dataclass(frozen=True)
class SuffixForward:
    """One pass over a span of B suffixes; `reuse` and `refresh` are its two kinds.

    Attributes:
        backbone: the model (static).
        params: its parameters.
        cache: the G prefixes.
        rows: the rows.
        boundary: b, at most L - 1.
        start: suffix index at which each row's span begins.
        update: which KV of the span replace those in a suffix cache; the others were frozen earlier.
        renew: rows whose deep prefix KV a refresh replaces; the others are inside an interval, and keep theirs.
        valid: suffix tokens that may be attended to.
        block_ids: under block-causal attention the block of each query and of each suffix token; None: all see all.
    """

    backbone: Backbone
    params: Params
    cache: PrefixCache
    rows: Rows
    boundary: Int[Array, ""]
    start: Int[Array, " B"]
    update: Bool[Array, "B T"]
    renew: Bool[Array, " B"]
    valid: Bool[Array, "B U"]
    block_ids: tuple[Int[Array, "B T"], Int[Array, "B U"]] | None = None

    @property
    def _last(self) -> int:
        return self.backbone.config.num_layers - 1

    @property
    def _whole(self) -> bool:
        return self.update.shape[1] == self.rows.tokens.shape[1]

    def _span(self, values: Array) -> Array:
        """The part of per-row values [B, U] inside the span."""
        if self._whole:
            return values
        size = self.update.shape[1]
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(values, self.start)

    def _merge(self, index: Array, fresh: Array, cached: Array) -> tuple[Array, Array]:
        """KV of the whole suffix in a layer, and the updated cache. An empty cache: the span is the whole suffix."""
        if not cached.shape[0]:
            return fresh, cached

        def write(row: Array, cached: Array) -> Array:
            # Row by row: a batched update is a scatter, for which TPUs change the memory layout of the whole cache.
            at = (index, row, 0, self.start[row], 0)
            old = jax.lax.dynamic_slice(cached, at, (1, 1, *fresh.shape[1:]))
            return jax.lax.dynamic_update_slice(cached, jnp.where(self.update[row][:, None], fresh[row], old), at)

        cached = jax.lax.fori_loop(0, fresh.shape[0], write, cached)
        return jax.lax.dynamic_index_in_dim(cached, index, keepdims=False), cached

    def _merge_both(self, index: Array, k: Array, v: Array, suffix: SuffixCache) -> tuple[Array, Array, SuffixCache]:
        k, cached_k = self._merge(index, k, suffix.k)
        v, cached_v = self._merge(index, v, suffix.v)
        return k, v, SuffixCache(cached_k, cached_v)

    def _attend(
        self, q: Array, k: Array, v: Array, kv: PrefixCache | DeepCache, slot: Array, *, shared: bool
    ) -> Float[Array, "B N T H"]:
        index = self.rows.prefix_index
        return self.backbone.attention(
            q,
            kv.k,
            kv.v,
            k,
            v,
            prefix_index=index if shared else None,
            prefix_len=self.cache.length if shared else self.cache.length[index],
            suffix_valid=self.valid,
            layer=slot,
            block_ids=self.block_ids,
        )

    def _layer(self, index: Array, carry: Carry, kv: PrefixCache | DeepCache, slot: Array, *, shared: bool) -> Carry:
        """One layer on the span's tokens only."""
        x, suffix = carry
        layer, positions = layer_params(self.params, index), self._span(self.rows.positions)
        k, v = self.backbone.key_value(layer, x, positions)
        k, v, suffix = self._merge_both(index, k, v, suffix)
        q = self.backbone.query(layer, x, positions)
        return self.backbone.finish(layer, x, self._attend(q, k, v, kv, slot, shared=shared)), suffix

    def _shared_layer(self, index: Array, carry: Carry) -> Carry:
        return self._layer(index, carry, self.cache, index, shared=True)

    def _deep_layer(self, index: Array, carry: Carry, deep: DeepCache) -> Carry:
        return self._layer(index, carry, deep, index - self.boundary - 1, shared=False)

    def _embed(self) -> Float[Array, "B T D"]:
        return self.backbone.embed(self.params, self._span(self.rows.tokens), self._span(self.rows.positions))

    def reuse(self, deep: DeepCache, suffix: SuffixCache) -> Carry:
        """Runs the span's tokens through all layers.

        Returns:
            Hidden states of the span [B, T, D], and the suffix cache.
        """
        carry = jax.lax.fori_loop(0, self.boundary + 1, self._shared_layer, (self._embed(), suffix))
        if deep.k.shape[0]:
            carry = jax.lax.fori_loop(
                self.boundary + 1, self._last + 1, lambda index, carry: self._deep_layer(index, carry, deep), carry
            )
        return carry

    def refresh(self, deep: DeepCache, suffix: SuffixCache) -> DeepCarry:
        """Runs the span below the boundary, and prefix and span above it; rows that are not due get what `reuse` gives.

        Returns:
            Hidden states of the span [B, T, D], the fresh deep prefix KV, and the suffix cache.
        """
        if not deep.k.shape[0]:
            x, suffix = self.reuse(deep, suffix)
            return x, deep, suffix
        split = self.boundary < self._last
        x, suffix = jax.lax.fori_loop(
            0, jnp.where(split, self.boundary, self._last + 1), self._shared_layer, (self._embed(), suffix)
        )
        # A loop that runs once or not at all, instead of a conditional: its carry is updated in place.
        return jax.lax.fori_loop(
            0, split.astype(jnp.int32), lambda _, carry: self._deep_layers(*carry), (x, deep, suffix)
        )

    def _deep_layers(self, x_span: Array, deep: DeepCache, suffix: SuffixCache) -> DeepCarry:
        num_rows, num_prefix = self.rows.tokens.shape[0], self.cache.k.shape[-2]
        prefix_positions = jnp.broadcast_to(jnp.arange(num_prefix), (num_rows, num_prefix))
        positions = jnp.concatenate([prefix_positions, self._span(self.rows.positions)], axis=1)

        def whole_layer(index: Array, carry: DeepCarry) -> DeepCarry:
            x, deep, suffix = carry
            layer = layer_params(self.params, index)
            k, v = self.backbone.key_value(layer, x, positions)
            deep = self._write(deep, index, k[:, :, :num_prefix], v[:, :, :num_prefix])
            k, v, suffix = self._merge_both(index, k[:, :, num_prefix:], v[:, :, num_prefix:], suffix)
            q = self.backbone.query(layer, x, positions)
            attended = self._attend(q, k, v, deep, index - self.boundary - 1, shared=False)
            return self.backbone.finish(layer, x, attended), deep, suffix

        x, suffix = self._boundary_layer(x_span, suffix)
        x, deep, suffix = jax.lax.fori_loop(self.boundary + 1, self._last, whole_layer, (x, deep, suffix))
        last = jnp.asarray(self._last)
        k, v = self.backbone.key_value(layer_params(self.params, last), x[:, :num_prefix], prefix_positions)
        deep = self._write(deep, last, k, v)
        x, suffix = self._deep_layer(last, (x[:, num_prefix:], suffix), deep)
        return x, deep, suffix

    def _boundary_layer(self, x: Float[Array, "B T D"], suffix: SuffixCache) -> Carry:
        """Layer b: prefix KV and prefix queries are still per prefix; the output is per row."""
        rows, hidden = self.rows, self.cache.hidden_at(self.boundary)
        # Without the barrier, XLA would hoist this layer out of the loops and copy it out of the stack.
        x, boundary = jax.lax.optimization_barrier((x, self.boundary))
        layer, positions = layer_params(self.params, boundary), self._span(rows.positions)
        q_prefix = self.backbone.query(layer, hidden, jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2]))
        q = jnp.concatenate([q_prefix[rows.prefix_index], self.backbone.query(layer, x, positions)], axis=2)
        k, v = self.backbone.key_value(layer, x, positions)
        k, v, suffix = self._merge_both(self.boundary, k, v, suffix)
        attended = self._attend(q, k, v, self.cache, self.boundary, shared=True)
        return self.backbone.finish(layer, jnp.concatenate([hidden[rows.prefix_index], x], axis=1), attended), suffix

    def _write(self, deep: DeepCache, index: Array, k: Array, v: Array) -> DeepCache:
        slot = index - self.boundary - 1

        def write(stack: Array, fresh: Array) -> Array:  # a stack of values, or of their scales
            kept = jax.lax.dynamic_index_in_dim(stack, slot, keepdims=False)
            fresh = jnp.where(self.renew[:, None, None, None], fresh, kept)
            return jax.lax.dynamic_update_index_in_dim(stack, fresh, slot, 0)

        def put(stack: KV, fresh: Array) -> KV:
            return jax.tree.map(write, stack, stored(fresh, dtype_of(stack)))

        return DeepCache(k=put(deep.k, k), v=put(deep.v, v))
