"""Manual mesh axes: inside `shard_map` a kernel's operands and results must say over which axes they vary."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jaxtyping import Array

from bicache_jax.core.axes import vary, varying_axes


def spread(operands: Sequence[Array]) -> tuple[list[Array], jax.sharding.ManualAxisType]:
    """Lets all operands of a kernel vary over the axes that any of them varies over.

    Args:
        operands: arrays, some of them perhaps the same on all devices.

    Returns:
        The operands, and the type of a result that is made from them.
    """
    axes = varying_axes(list(operands))
    return vary(list(operands), axes), jax.sharding.ManualAxisType(varying=axes)
