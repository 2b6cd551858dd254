"""Parameter trees as paths and leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Finish = Callable[[tuple[str, ...], Any], list[tuple[tuple[str, ...], Any]]]
"""What becomes of a parameter that has been loaded: one or several, each with its path."""


def as_it_is(path: tuple[str, ...], leaf: Any) -> list[tuple[tuple[str, ...], Any]]:
    """A parameter that stays what it is."""
    return [(path, leaf)]


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
