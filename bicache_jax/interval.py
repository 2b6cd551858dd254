"""The jitted program: k refresh intervals of a batch of rows, split at a dynamic layer boundary.

An interval is one refresh step and up to N - 1 reuse steps (BiCache, arXiv 2606.07571, section 4):

* refresh: layers `< b` run on suffix tokens against the shared prefix-alone KV. In front of layer b the prefix-alone
  hidden states join, and layers `>= b` run on the whole sequence; the prefix KV they make are kept per row.
* reuse: suffix tokens only, against the shared KV in layers `<= b` and the row's own above.

Three savings follow exactly, without changing a token. Layer b's prefix input is the prefix-alone hidden state, so its
prefix KV (and queries) are shared as well. In layer L - 1 the prefix gives K and V alone. And so b = L - 1 equals
b = L: nothing deep is left. No prefix cache at all is the same program with P = 0.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bicache_jax.backbone import Backbone, Params, layer_params
from bicache_jax.cache import Decoding, DeepCache, PrefixCache, Rows
from bicache_jax.head import choose
from bicache_jax.unmask import RULES, scheduled_count, select


@dataclasses.dataclass(frozen=True)
class _Step:
    """One forward pass over the suffix rows, refresh or reuse; the closure of what does not change inside a dispatch."""

    backbone: Backbone
    params: Params
    cache: PrefixCache
    rows: Rows
    boundary: Int[Array, ""]

    @property
    def num_layers(self) -> int:
        return self.backbone.config.num_layers

    def shared_layer(self, index: Array, x: Array) -> Array:
        """A layer whose prefix KV are the prefix-alone ones."""
        return self._suffix_layer(index, x, self.cache, index, self.rows.prefix_index)

    def deep_layer(self, index: Array, x: Array, deep: DeepCache) -> Array:
        """A layer whose prefix KV are the row's own."""
        return self._suffix_layer(index, x, deep, index - self.boundary - 1, None)

    def _lengths(self, prefix_index: Array | None) -> Array:
        return self.cache.length if prefix_index is not None else self.cache.length[self.rows.prefix_index]

    def _suffix_layer(
        self, index: Array, x: Array, kv: PrefixCache | DeepCache, slot: Array, prefix_index: Array | None
    ) -> Array:
        layer = layer_params(self.params, index)
        k, v = self.backbone.key_value(layer, x, self.rows.positions)
        q = self.backbone.query(layer, x, self.rows.positions)
        return self.backbone.finish(layer, x, self._attend(q, k, v, kv, slot, prefix_index))

    def _attend(
        self, q: Array, k: Array, v: Array, kv: PrefixCache | DeepCache, slot: Array, prefix_index: Array | None
    ) -> Array:
        return self.backbone.attention(
            q,
            kv.k,
            kv.v,
            k,
            v,
            prefix_index=prefix_index,
            prefix_len=self._lengths(prefix_index),
            suffix_valid=self.rows.valid,
            layer=slot,
        )

    def reuse(self, deep: DeepCache) -> Float[Array, "B U D"]:
        """Suffix tokens only, in all layers."""
        x = self.backbone.embed(self.params, self.rows.tokens)
        x = jax.lax.fori_loop(0, self.boundary + 1, self.shared_layer, x)
        if deep.k.shape[0]:
            x = jax.lax.fori_loop(self.boundary + 1, self.num_layers, lambda i, x: self.deep_layer(i, x, deep), x)
        return x

    def refresh(self, deep: DeepCache) -> tuple[Float[Array, "B U D"], DeepCache]:
        """The whole sequence above the boundary; returns the fresh deep prefix KV as well."""
        if not deep.k.shape[0]:
            return self.reuse(deep), deep
        last = self.num_layers - 1
        x = self.backbone.embed(self.params, self.rows.tokens)
        x = jax.lax.fori_loop(0, jnp.where(self.boundary < last, self.boundary, last + 1), self.shared_layer, x)
        # A loop of one turn or none rather than a conditional: its carry is updated in place.
        return jax.lax.fori_loop(
            0, (self.boundary < last).astype(jnp.int32), lambda _, carry: self._deep_layers(*carry), (x, deep)
        )

    def _deep_layers(self, x_suffix: Array, deep: DeepCache) -> tuple[Array, DeepCache]:
        backbone, cache, rows, last = self.backbone, self.cache, self.rows, self.num_layers - 1
        num_prefix = cache.k.shape[-2]
        prefix_positions = jnp.arange(num_prefix)
        positions = jnp.concatenate(
            [jnp.broadcast_to(prefix_positions, (rows.tokens.shape[0], num_prefix)), rows.positions], axis=1
        )

        def boundary_layer(x_suffix: Array) -> Array:
            layer = layer_params(self.params, self.boundary)
            hidden = cache.hidden_at(self.boundary)
            q_prefix = backbone.query(layer, hidden, jnp.broadcast_to(prefix_positions, hidden.shape[:2]))
            q_suffix = backbone.query(layer, x_suffix, rows.positions)
            q = jnp.concatenate([q_prefix[rows.prefix_index], q_suffix], axis=2)
            k, v = backbone.key_value(layer, x_suffix, rows.positions)
            attended = self._attend(q, k, v, cache, self.boundary, rows.prefix_index)
            x = jnp.concatenate([hidden[rows.prefix_index], x_suffix], axis=1)
            return backbone.finish(layer, x, attended)

        def write(deep: DeepCache, index: Array, k: Array, v: Array) -> DeepCache:
            slot = index - self.boundary - 1
            return DeepCache(
                k=jax.lax.dynamic_update_index_in_dim(deep.k, k[:, :, :num_prefix], slot, 0),
                v=jax.lax.dynamic_update_index_in_dim(deep.v, v[:, :, :num_prefix], slot, 0),
            )

        def whole_layer(index: Array, carry: tuple[Array, DeepCache]) -> tuple[Array, DeepCache]:
            x, deep = carry
            layer = layer_params(self.params, index)
            k, v = backbone.key_value(layer, x, positions)
            deep = write(deep, index, k, v)
            q = backbone.query(layer, x, positions)
            attended = self._attend(
                q, k[:, :, num_prefix:], v[:, :, num_prefix:], deep, index - self.boundary - 1, None
            )
            return backbone.finish(layer, x, attended), deep

        x, deep = jax.lax.fori_loop(self.boundary + 1, last, whole_layer, (boundary_layer(x_suffix), deep))
        x_prefix, x_suffix = x[:, :num_prefix], x[:, num_prefix:]
        k, v = backbone.key_value(layer_params(self.params, last), x_prefix, positions[:, :num_prefix])
        deep = write(deep, jnp.asarray(last), k, v)
        return self.deep_layer(jnp.asarray(last), x_suffix, deep), deep


def unmask(
    backbone: Backbone, params: Params, x_bud: Float[Array, "B U D"], rows: Rows, decoding: Decoding, block_width: int
) -> Rows:
    """Unmasks the step's tokens in each row's current block and moves the row's counters."""
    config = backbone.config
    offset = rows.block[:, None] * decoding.block_length + jnp.arange(block_width)
    # Families that shift logits put the token before the response in front of it, so hidden states line up as they are.
    place = jnp.minimum(offset + int(config.shift_logits), rows.tokens.shape[1] - 1)
    hidden = jnp.take_along_axis(x_bud, jnp.minimum(offset, x_bud.shape[1] - 1)[..., None], axis=1)
    tokens = jnp.take_along_axis(rows.tokens, place, axis=1)

    def position_keys(key: Array, step: Array, offsets: Array) -> Array:
        return jax.vmap(lambda at: jax.random.fold_in(jax.random.fold_in(key, step), at))(offsets)

    keys = jax.vmap(position_keys)(rows.key, rows.step, offset)
    token_keys, order_keys = jnp.moveaxis(jax.vmap(jax.vmap(jax.random.split))(keys), -1, 0)
    choice = choose(
        backbone.final_norm(params, hidden),
        *backbone.head(params),
        mask_id=config.mask_id,
        temperature=decoding.temperature,
        keys_bw=token_keys,
    )
    with jax.named_scope("unmask"):
        in_block = jnp.arange(block_width) < decoding.block_length
        candidate = (tokens == config.mask_id) & in_block & ~rows.done[:, None]
        score = jax.lax.switch(decoding.remasking, RULES, choice, order_keys)
        count = scheduled_count(decoding.block_length, decoding.block_steps, rows.block_step)
        chosen = select(score, candidate, count)
        row_index = jnp.arange(rows.tokens.shape[0])[:, None]
        updated = rows.tokens.at[row_index, jnp.where(chosen, place, rows.tokens.shape[1])].set(
            choice.token, mode="drop"
        )

        active = (~rows.done).astype(jnp.int32)
        block_step = rows.block_step + active
        over = block_step == decoding.block_steps
        block = rows.block + over
        block_step = jnp.where(over, 0, block_step)
        left = jnp.any(candidate & ~chosen, axis=1)
        complete = (block == decoding.num_blocks) | ((rows.block == decoding.num_blocks - 1) & ~left)
        return dataclasses.replace(
            rows,
            tokens=updated,
            step=rows.step + active,
            block=block,
            block_step=block_step,
            done=rows.done | complete,
            forward_passes=rows.forward_passes + active,
        )


def intervals(
    backbone: Backbone,
    params: Params,
    cache: PrefixCache,
    rows: Rows,
    decoding: Decoding,
    num_intervals: Int[Array, ""],
    *,
    block_width: int,
    deep_layers: int,
) -> Rows:
    """Runs up to `num_intervals` intervals, fewer when all rows are complete.

    Args:
        backbone: the model (static).
        params: its parameters.
        cache: the G prefixes of the batch, with `decoding.boundary` among their boundaries.
        rows: the B rows.
        decoding: what the rows share; nothing in it is static.
        num_intervals: k, traced.
        block_width: W, positions that the head looks at; at least `decoding.block_length` (static).
        deep_layers: layers of deep KV to make room for; at least `L - 1 - b` (static).

    Returns:
        The rows at the next interval edge.
    """
    config = backbone.config
    num_prefix = cache.k.shape[-2]
    deep_layers = deep_layers if num_prefix else 0
    shape = (deep_layers, rows.tokens.shape[0], config.num_kv_heads, num_prefix, config.head_dim)
    deep = DeepCache(k=jnp.zeros(shape, cache.k.dtype), v=jnp.zeros(shape, cache.v.dtype))
    last = config.num_layers - 1
    boundary = jnp.minimum(decoding.boundary, last) if deep_layers else jnp.asarray(last)

    def forward(rows: Rows) -> _Step:
        return _Step(backbone, params, cache, rows, boundary)

    def advance(rows: Rows, x: Array) -> Rows:
        return unmask(backbone, params, x, rows, decoding, block_width)

    def reuse_step(carry: tuple[Array, Rows, DeepCache]) -> tuple[Array, Rows, DeepCache]:
        index, rows, deep = carry
        return index + 1, advance(rows, forward(rows).reuse(deep)), deep

    def more_steps(carry: tuple[Array, Rows, DeepCache]) -> Array:
        index, rows, _ = carry
        return (index < decoding.refresh_interval) & ~jnp.all(rows.done)

    def interval(carry: tuple[Array, Rows, DeepCache]) -> tuple[Array, Rows, DeepCache]:
        index, rows, deep = carry
        with jax.named_scope("refresh"):
            x, deep = forward(rows).refresh(deep)
            rows = advance(rows, x)
        with jax.named_scope("reuse"):
            _, rows, deep = jax.lax.while_loop(more_steps, reuse_step, (jnp.asarray(1), rows, deep))
        return index + 1, rows, deep

    def more_intervals(carry: tuple[Array, Rows, DeepCache]) -> Array:
        index, rows, _ = carry
        return (index < num_intervals) & ~jnp.all(rows.done)

    return jax.lax.while_loop(more_intervals, interval, (jnp.asarray(0), rows, deep))[1]


decode = functools.partial(
    jax.jit, static_argnames=("backbone", "block_width", "deep_layers"), donate_argnames=("rows",)
)(intervals)
