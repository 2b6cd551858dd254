"""Manual mesh axes: inside `shard_map` a kernel's operands and results must say over which axes they vary."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jaxtyping import Array


def spread(operands: Sequence[Array]) -> tuple[list[Array], jax.sharding.ManualAxisType]:
    """Lets all operands of a kernel vary over the axes that any of them varies over.

    Args:
        operands: arrays, some of them perhaps the same on all devices.

    Returns:
        The operands, and the type of a result that is made from them.
    """
    varying: frozenset = frozenset().union(*(jax.typeof(operand).manual_axis_type.varying for operand in operands))

    def cast(operand: Array) -> Array:
        missing = tuple(sorted(varying - jax.typeof(operand).manual_axis_type.varying))
        return jax.lax.pcast(operand, missing, to="varying") if missing else operand

    return [cast(operand) for operand in operands], jax.sharding.ManualAxisType(varying=varying)
