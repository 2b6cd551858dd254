"""Where parameters are loaded to: one device, or the devices of a mesh in parts, padded if necessary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]
"""Reads the part of a parameter at an index: one slice per axis, with start and stop."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where one parameter is loaded to.

    Attributes:
        shape: its shape in the checkpoint, with layers stacked.
        dtype: dtype after loading.
        sharding: its sharding; None: the default device.
        sources: for each axis, the source of each index on the devices: an index in the checkpoint or -1 for zeros
            (`bicache_jax.sharding.Partition.source`); None: the axis is the same as in the checkpoint.
    """

    shape: tuple[int, ...]
    dtype: Any
    sharding: Sharding | None = None
    sources: tuple[np.ndarray | None, ...] = ()

    @property
    def is_padded(self) -> bool:
        """Whether an axis differs from the checkpoint's."""
        return any(source is not None for source in self.sources)

    @property
    def final_shape(self) -> tuple[int, ...]:
        """Its shape on the devices."""
        if not self.sources:
            return self.shape
        pairs = zip(self.shape, self.sources, strict=True)
        return tuple(size if source is None else len(source) for size, source in pairs)

    def place(self, read: Read) -> jax.Array:
        """Loads the parameter onto its devices.

        Args:
            read: reads parts of it by the checkpoint's indices.

        Returns:
            The array. A part that several devices of this process hold is read once. Only one part is in host memory
            at a time. Parts for devices of other processes are not read.
        """
        shape = self.final_shape
        if self.sharding is None:
            return jnp.asarray(self.gather(read, tuple(slice(0, size) for size in shape)))
        holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in self.sharding.addressable_devices_indices_map(shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        parts: list[jax.Array] = []
        for bounds, devices in holders.items():
            block = self.gather(read, tuple(slice(*pair) for pair in bounds))
            parts += jax.block_until_ready([jax.device_put(block, device) for device in devices])
        return jax.make_array_from_single_device_arrays(shape, self.sharding, parts)

    def expand(self, array: jax.Array) -> jax.Array:
        """Pads a parameter with its checkpoint shape, on any devices, and moves it to its sharding."""
        for axis, source in enumerate(self.sources):
            if source is not None:
                there = np.expand_dims(source >= 0, tuple(range(1, array.ndim - axis)))
                array = jnp.where(there, jnp.take(array, np.maximum(source, 0), axis=axis), 0)
        return array if self.sharding is None else jax.device_put(array, self.sharding)

    def gather(self, read: Read, index: Index) -> np.ndarray:
        """Reads the part of the padded parameter at an index."""
        if not self.is_padded:
            return read(index)
        inner = list(index)
        held = [np.arange(part.stop - part.start) for part in index]  # indices that are not padding, along each axis
        taken = list(held)  # their indices in the part that is read
        for axis, source in enumerate(self.sources):
            if source is not None:
                wanted = source[index[axis]]
                held[axis] = np.flatnonzero(wanted >= 0)
                there = wanted[held[axis]]
                low, high = (int(there.min()), int(there.max()) + 1) if len(there) else (0, 0)
                inner[axis], taken[axis] = slice(low, high), there - low
        found = np.zeros([part.stop - part.start for part in index], self.dtype)
        if all(part.stop > part.start for part in inner):
            found[np.ix_(*held)] = read(tuple(inner))[np.ix_(*taken)]
        return found


def targets(abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Targets on the default device for a tree of shapes and dtypes (`models.abstract`)."""
    return jax.tree.map(lambda leaf: Target(leaf.shape, leaf.dtype, leaf.sharding), dict(abstract))
