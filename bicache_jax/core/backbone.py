"""The interface between models and the decoding code: the pieces of a transformer, none of which knows about caches.

The core never imports a model. A backbone is a static argument (frozen, hashable) of the jitted programs. Parameters
are passed separately, as a pytree with `layers` leaves stacked as `[L, ...]`.
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
LayerParams = Any
Path = tuple[str, ...]
"""Keys that lead to a parameter in its tree."""
Table = Mapping[Path, tuple[str, ...]]
"""Logical axes of every parameter, by path."""


@runtime_checkable
class Backbone(Protocol):
    """The pieces of a transformer; shapes use the letters defined in `bicache_jax`."""

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
        """Mesh axis over which heads, MLP and vocabulary are split; None: they are not split."""
        ...

    @property
    def axes(self) -> Table:
        """Logical axes of every parameter, by path."""
        ...

    def embed(self, params: Params, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Token embeddings."""
        ...

    def query(
        self, layer: LayerParams, x_btd: Float[Array, "B T D"], positions_bt: Int[Array, "B T"]
    ) -> Float[Array, "B N T H"]:
        """Rotated queries of a layer."""
        ...

    def key_value(
        self, layer: LayerParams, x_btd: Float[Array, "B T D"], positions_bt: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]:
        """Rotated keys and (unrotated) values of a layer."""
        ...

    def finish(
        self, layer: LayerParams, x_btd: Float[Array, "B T D"], attended_bnth: Float[Array, "B N T H"]
    ) -> Float[Array, "B T D"]:
        """Output projection, residuals and MLP of a layer."""
        ...

    def final_norm(self, params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The norm before the head."""
        ...

    def head(self, params: Params) -> tuple[Array, Float[Array, " V"] | None, Float[Array, " V"] | None]:
        """Rows of the LM head [V, D], its bias if any, and its scales where the rows are in 8 bits."""
        ...


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
