"""Looks for NaN and infinity in weights: checks each parameter on its device while the checkpoint is loaded.

In float16, which ends at 65,504, it is always done: a weight beyond is infinite there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from bicache_jax.core.types import BicacheError

_MOST_NAMED = 8


class WeightCheck:
    """Looks for NaN and infinity in parameters."""

    def __init__(self, folder: Path, *, wanted: bool) -> None:
        """Starts a check.

        Args:
            folder: the checkpoint.
            wanted: whether to check; if False, only what is float16 is.
        """
        self._folder, self._wanted = folder, wanted
        self._found: list[str] = []
        self._narrow = False

    def look(self, array: jax.Array, names: Sequence[str]) -> jax.Array:
        """Checks a parameter.

        Args:
            array: the parameter, on one device or many.
            names: the tensors that it is made of, one for each place along its leading axes if it is stacked.

        Returns:
            The parameter itself.
        """
        if self._wanted or array.dtype == jnp.float16:
            self._narrow |= array.dtype == jnp.float16
            here = array.sharding
            everywhere = NamedSharding(here.mesh, PartitionSpec()) if isinstance(here, NamedSharding) else None
            axes = next(n for n in range(array.ndim + 1) if math.prod(array.shape[:n]) == len(names))
            flags = jax.jit(_finite, static_argnames="axes", out_shardings=everywhere)(array, axes=axes)
            found = np.asarray(flags).reshape(-1)
            self._found += [name for name, finite in zip(names, found, strict=True) if not finite]
        return array

    def finish(self) -> None:
        """Ends the check.

        Raises:
            BicacheError: a parameter is not finite; the message names the tensors.
        """
        if self._found:
            more = len(self._found) - _MOST_NAMED
            listed = ", ".join(self._found[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
            if self._narrow:
                raise BicacheError(
                    f"{self._folder}: beyond 65504, where float16 ends, or not finite: {listed}; load it in float32 or"
                    " bfloat16 (--dtype)"
                )
            raise BicacheError(
                f"{self._folder}: NaN or infinity in {listed}: the checkpoint is damaged; download or convert it again"
            )


def _finite(x: Array, axes: int) -> Bool[Array, "..."]:
    """Whether a parameter is finite, for each place along so many leading axes."""
    return jnp.all(jnp.isfinite(x), axis=tuple(range(axes, x.ndim)))
