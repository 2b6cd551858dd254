"""Parameter trees as paths and leaves, and the tensors that a leaf is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bicache_jax.checkpoints.fields import TensorMap


def paths(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the leaves of a tree of dictionaries, each with its path of keys."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from paths(value, (*above, name))
        else:
            yield (*above, name), value


def tree_of(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Builds a tree from its leaves; the inverse of `paths`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


def is_stacked(path: tuple[str, ...]) -> bool:
    """Whether a parameter has a leading axis of layers."""
    return path[0] == "layers"


def stored_names(mapping: TensorMap, path: tuple[str, ...], leaf: Any) -> list[str]:
    """Checkpoint names of the tensors that a parameter is made of, one per layer if it is stacked."""
    count = leaf.shape[0] if is_stacked(path) else 1
    return [mapping.names[path].format(layer=layer) for layer in range(count)]
