"""The interface between models and the decoding code: the pieces of a transformer, none of which knows about caches.

The core never imports a model. A backbone is a static argument (frozen, hashable) of the jitted programs. Parameters
are passed separately, as a pytree with `layers` leaves stacked as `[L, ...]`.

The decoding code puts the pieces together. For x = `embed(params, ids, positions)`, every layer is

    k, v = key_value(layer, x, positions)
    q    = query(layer, x, positions)
    x    = finish(layer, x, attention(q, k, v, and what is cached))

and `final_norm` and `head` end the pass. Between these calls keys and values are stored, cut, and joined with those of
other passes. So a piece must give each token what follows from that token's `x` and position alone, wherever it stands
in the array and whatever is beside it. `bicache_jax.testing.check_backbone` says where one does not.

What is not in a piece is data on `ModelConfig`: the sizes, whether attention is `full` or `block_causal`, and how the
model's loop decodes. Attention is the softmax of `q k / sqrt(H)` over all visible tokens: another scale belongs into
`query`, and a bias by distance or a cap on scores cannot be had. Nor can a pass know its denoising step: a model
that is conditioned on the time, or on the noise, cannot be one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bicache_jax.core.attention import Attention
from bicache_jax.core.config import ModelConfig

Params = Any
"""Nested dicts of arrays, `{"layers": {...}, ...}`; leaves under `layers` are `[L, ...]`, the others are free."""
LayerParams = Any
"""What is under `layers`, for one layer: the same dicts without the leading `L`."""
Path = tuple[str, ...]
"""Keys that lead to a parameter in its tree."""
Table = Mapping[Path, tuple[str | None, ...]]
"""Logical axes of every parameter, by path; None: an axis that is never split."""
PIECES = ("embed", "query", "key_value", "finish", "final_norm", "head")
"""Methods of a backbone."""


@runtime_checkable
class Backbone(Protocol):
    """The pieces of a transformer; shapes use the letters defined in `bicache_jax`.

    An implementation is a value: equal if made from equal arguments, hashable, without parameters and without state. A
    frozen dataclass with the fields `config`, `attention` and `axis` is one, and its class then is a `MakeBackbone`.
    """

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def attention(self) -> Attention:
        """Prefix attention to use."""
        ...

    @property
    def axis(self) -> str | None:
        """Mesh axis over which heads, MLP and vocabulary are split; None: they are not split.

        Under it `config` has one shard's sizes, and `embed` and `finish` sum what the shards have
        (`bicache_jax.core.numerics.psum`).
        """
        ...

    @property
    def axes(self) -> Table | None:
        """Logical axes of every parameter, by path (`bicache_jax.sharding.partition.MESH_AXES` lists them).

        None: parameters are never split. The model then runs on one device, or on a mesh with `model=1`.
        """
        ...

    def embed(self, params: Params, ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings, and whatever a position adds to them.

        Positions count from 0 over prefix and suffix. Padding has any, also beyond `ModelConfig.max_length`: what it
        gets is not looked at, but has to be finite.
        """
        ...

    def query(
        self, layer: LayerParams, x_btd: Float[Array, "B T D"], positions_bt: Int[Array, "B T"]
    ) -> Float[Array, "B N T H"]:
        """Rotated queries of a layer. The `N // K` query heads of one key head are adjacent."""
        ...

    def key_value(
        self, layer: LayerParams, x_btd: Float[Array, "B T D"], positions_bt: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Rotated keys and (unrotated) values of a layer, as they are cached: nothing is applied to them later."""
        ...

    def finish(
        self, layer: LayerParams, x_btd: Float[Array, "B T D"], attended_bnth: Float[Array, "B N T H"]
    ) -> Float[Array, "B T D"]:
        """Output projection, residuals and MLP of a layer."""
        ...

    def final_norm(self, params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The norm before the head, and whatever else is between the last layer and the head."""
        ...

    def head(self, params: Params) -> tuple[Array, Float[Array, " V"] | None, Float[Array, " V"] | None]:
        """Rows of the LM head [V, D], its bias if any, and its scales where the rows are in 8 bits."""
        ...


@runtime_checkable
class MakeBackbone(Protocol):
    """Makes the backbone of an architecture; the class of a backbone with these fields is one."""

    def __call__(self, config: ModelConfig, attention: Attention, axis: str | None = None, /) -> Backbone:
        """The pieces for the architecture, or for a shard's part of it."""
        ...


def lacking(made: object, names: tuple[str, ...] = (*PIECES, "config", "attention", "axis", "axes")) -> str:
    """What a backbone, or its class, has not of `Backbone`, as one line; nothing if it has it all."""
    missing = [name for name in names if not hasattr(made, name)]
    kind = made.__name__ if isinstance(made, type) else type(made).__name__
    return f"{kind} lacks {', '.join(missing)}: see bicache_jax.core.backbone.Backbone" if missing else ""


STACKS = ("dense", "mixture")
"""Parameters that only some layers have, stacked over these."""


def layer_params(params: Params, layer: Int[Array, ""] | int) -> LayerParams:
    """Parameters of one layer; `layer` may be traced.

    Where layers differ there are further stacks (`STACKS`). They are passed on whole with the number of the layer, and
    read where it has them: no branch that is not taken copies weights.
    """
    found = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), params["layers"])
    stacks = {name: params[name] for name in STACKS if name in params}
    return {**found, **stacks, "layer": jnp.asarray(layer)} if stacks else found
