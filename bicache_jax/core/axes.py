"""Mesh axes of arrays: manual ones inside `shard_map`, explicit ones under a mesh of sharding-in-types.

Inside `shard_map` every array says over which axes it varies, and what enters a loop must vary over the axes that what
leaves it does. On explicit axes a gather must say how its result lies. Both are properties of the caller's arrays, so
they are read from these; on one device there are neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def varying_axes(tree: Any) -> frozenset[str]:
    """Manual mesh axes over which any array of a tree varies."""
    leaves = map(jax.typeof, jax.tree.leaves(tree))
    return frozenset().union(*(leaf.manual_axis_type.varying for leaf in leaves))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """The same arrays, varying over these manual axes, too."""

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - jax.typeof(leaf).manual_axis_type.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def vary_like(tree: Any, like: Any) -> Any:
    """The same arrays, varying over every manual axis over which an array of `like` does: what may enter a loop."""
    axes = varying_axes(like)
    return vary(tree, axes) if axes else tree


def explicit_axis(array: Any, dim: int) -> Any:
    """The explicit mesh axis along which a dimension of an array lies; None where there is none."""
    spec = jax.typeof(array).sharding.spec
    return spec[dim] if dim < len(spec) else None


def on_auto_axes(function: Callable[..., Any], args: Sequence[Any], out_specs: Any) -> Any:
    """Calls a function on its arguments with all mesh axes left to the compiler.

    Args:
        function: what cannot say how each of its arrays lies.
        args: pytrees of arrays, on explicit axes perhaps.
        out_specs: a tree of `PartitionSpec` like its results: how they lie where an argument has explicit axes.

    Returns:
        What the function returns.
    """
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(args))
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return function(*args)
    out_sharding = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), out_specs, is_leaf=lambda node: isinstance(node, P)
    )
    return jax.sharding.auto_axes(function, out_sharding=out_sharding)(*jax.tree.map(jnp.asarray, tuple(args)))


def without_gradient(function: Callable[..., Any], why: str) -> Callable[..., Any]:
    """The function, with a clear refusal where it is differentiated.

    Args:
        function: of positional pytrees of arrays.
        why: what is said.

    Returns:
        A function that raises TypeError under `jax.grad`, `jax.jvp` and similar transformations.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)  # tangents must not take the form of our pytrees, whose arrays are typed

        @jax.custom_jvp
        def call(leaves: list[Any]) -> Any:
            return function(*jax.tree.unflatten(tree, leaves))

        @call.defjvp
        def jvp(primals: Any, tangents: Any) -> Any:
            raise TypeError(why)

        return call(leaves)

    return run
