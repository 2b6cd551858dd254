"""Manual mesh axes: inside `shard_map` a kernel's operands and results must declare the axes they vary over."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jaxtyping import Array

from bicache_jax.core.axes import vary, varying_axes


def spread(operands: Sequence[Array]) -> tuple[list[Array], jax.sharding.ManualAxisType]:
    """Makes all operands of a kernel vary over every axis that one of them varies over.

    Args:
        operands: arrays; some may be the same on all devices.

    Returns:
        The operands, and the type of a result computed from them.
    """
    axes = varying_axes(list(operands))
    return vary(list(operands), axes), jax.sharding.ManualAxisType(varying=axes)
