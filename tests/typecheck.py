"""The checker behind jaxtyping's import hook: beartype with the numeric tower of PEP 484, where an int is a float."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from beartype import BeartypeConf, beartype

# JAX builds our pytrees around these too, where a program is lowered or sharded before there are arrays.
STAND_INS = (
    jax.ShapeDtypeStruct,
    jax.core.ShapedArray,
    jax.stages.ArgInfo,
    jax.sharding.Sharding,
    jax.sharding.PartitionSpec,
)

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks arguments and results, unless an argument only stands for an array."""
    checked = _checked(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, STAND_INS) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        return checked(*args, **kwargs)

    return call
