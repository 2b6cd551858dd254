"""Where models, kernels and numbers meet: the rest of the library asks here and knows none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax.configs import Device as Device
from bicache_jax.configs import Topology as Topology
from bicache_jax.configs import device as device
from bicache_jax.configs import device_of
from bicache_jax.configs import model_shape as model_shape
from bicache_jax.configs import published_table as published_table
from bicache_jax.configs import topology as topology
from bicache_jax.core.backbone import Backbone, MakeBackbone, Params, lacking
from bicache_jax.core.config import ATTENTION, ModelConfig
from bicache_jax.core.device import DeviceMemory
from bicache_jax.core.types import BicacheError
from bicache_jax.kernels import PrefixAttention, elsewhere
from bicache_jax.models import abstract, family_for


def backbone_for(
    config: ModelConfig, attention: str = "auto", *, axis: str | None = None, make: MakeBackbone | None = None
) -> Backbone:
    """The model's pieces.

    Args:
        config: the architecture, or a shard's part of it.
        attention: implementation of prefix attention (see `bicache_jax.kernels.prefix_attention`).
        axis: mesh axis over which the parts are summed; None: `config` is whole.
        make: makes them; None: the configuration's family does.

    Raises:
        BicacheError: the family is not registered, or what was made lacks a piece.
    """
    made = (make or family_for(config).backbone)(config, PrefixAttention(attention), axis)
    if missing := lacking(made):
        raise BicacheError(missing)
    return made


def backbone_here(
    config: ModelConfig,
    attention: str,
    *,
    devices: Sequence[Any],
    axis: str | None = None,
    make: MakeBackbone | None = None,
) -> Backbone:
    """`backbone_for` devices of this process.

    For CPUs, `auto` is plain JAX by name: there is no kernel for them, and those of other platforms would be traced
    with every program, for a quarter of its time.

    Raises:
        BicacheError: there is no such implementation of attention, or it does not run here; or as `backbone_for`.
    """
    if attention not in ATTENTION:
        raise BicacheError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    if why := elsewhere(attention, jax.default_backend()):
        raise BicacheError(f"attention: {why}")
    if attention == "auto" and all(device.platform == "cpu" for device in devices):
        attention = "xla"
    return backbone_for(config, attention, axis=axis, make=make)


def device_memory(devices: Sequence[Any]) -> DeviceMemory | None:
    """The least that some devices of this process offer to a plan; None where the platform does not say, as on CPUs."""
    mine = [device for device in devices if device.process_index == jax.process_index()]
    nbytes = min(((device.memory_stats() or {}).get("bytes_limit", 0) for device in mine), default=0)
    if not nbytes:
        return None
    known = device_of(mine[0].device_kind)
    return DeviceMemory(nbytes) if known is None else DeviceMemory(nbytes, known.copies)


def abstract_params(config: ModelConfig, dtype: jnp.dtype) -> Params:
    """Shapes and dtypes of a model's parameters."""
    return abstract(config, dtype)
