"""Meshes `("data", "model")`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from bicache_jax.core.types import BicacheError

DATA, MODEL = "data", "model"


def mesh_sizes(spec: str) -> dict[str, int]:
    """Sizes of the axes of a mesh, from its description; see `make_mesh`.

    Raises:
        BicacheError: the description cannot be parsed.
    """
    sizes = {DATA: 1, MODEL: 1}
    seen = set()
    for part in spec.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if found is None or found[1] not in sizes or found[1] in seen:
            raise BicacheError(f"mesh {spec}: expected data=INT,model=INT with sizes of 1 or more")
        seen.add(found[1])
        sizes[found[1]] = int(found[2])
    return sizes


def make_mesh(spec: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh from its description.

    Args:
        spec: `data=4,model=2`; an axis that is left out has size 1.
        devices: devices to use; None: all devices of the job (a single process may use only the first ones).

    Returns:
        The mesh, axes `("data", "model")`.

    Raises:
        BicacheError: the description cannot be parsed, or needs more devices than exist.
    """
    sizes = mesh_sizes(spec)
    wanted = math.prod(sizes.values())
    have = list(jax.devices() if devices is None else devices)
    if wanted > len(have):
        raise BicacheError(f"mesh {spec}: needs {wanted} devices, there are {len(have)}")
    if devices is None and wanted < len(have) and jax.process_count() > 1:
        raise BicacheError(f"mesh {spec}: a job of several processes must use all of its {len(have)} devices")
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=have[:wanted],
    )


def check_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh if engines can run on it.

    Raises:
        BicacheError: its axes are not `("data", "model")`.
    """
    if tuple(mesh.axis_names) != (DATA, MODEL):
        raise BicacheError(f"mesh: axes must be ('data', 'model'), got {tuple(mesh.axis_names)}; see make_mesh")
    return mesh
