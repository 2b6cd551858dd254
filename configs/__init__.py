"""Numbers that are data: model shapes, boundary tables, TPU slices, decoding presets (`bicache_jax.cli.presets`)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from bicache_jax.core.boundary import BoundaryTable, table_from_json
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.device import Copies
from bicache_jax.core.types import BicacheError


def _read(folder: str, name: str) -> Any:
    return json.loads((importlib.resources.files(__name__) / folder / f"{name}.json").read_bytes())


def names(folder: str) -> list[str]:
    """Names of the files in a folder (`models`, `boundary`, `topologies`)."""
    entries = (importlib.resources.files(__name__) / folder).iterdir()
    return sorted(entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json"))


def model_shape(name: str) -> ModelConfig:
    """A published architecture (`llada_8b`, `dream_7b`), or `small`, one for CPUs.

    Raises:
        BicacheError: there is no such shape.
    """
    if name not in names("models"):
        raise BicacheError(f"no model shape {name!r}; there are {', '.join(names('models'))}")
    fields = _read("models", name)
    return ModelConfig(**fields | {"eos_ids": tuple(fields["eos_ids"])})


@dataclasses.dataclass(frozen=True)
class Topology:
    """What a TPU generation offers; figures of one device, of which some generations have two on a chip.

    Attributes:
        platform: name of the generation, as in `v5e:2x4`.
        hbm_gib: memory that programs can use.
        tflops_bfloat16: peak arithmetic in 10^12 operations a second.
        hbm_gb_per_second: memory bandwidth in 10^9 bytes a second.
        devices_per_chip: devices that a chip appears as.
        device_kind: what JAX calls them.
        mlp_copies: activations as wide as the MLP that its compiler holds at a time (`scripts/what_fits.py` shows it).
        weight_copies: copies of all parameters that it makes in front of a program: on TPU7x it tiles them again.
        source: where the figures are from.
    """

    platform: str
    hbm_gib: float
    tflops_bfloat16: float
    hbm_gb_per_second: float
    devices_per_chip: int
    device_kind: str
    mlp_copies: int
    weight_copies: int
    source: str

    @property
    def copies(self) -> Copies:
        """What its compiler holds besides the arrays of a program."""
        return Copies(self.mlp_copies, self.weight_copies)


def topology(name: str) -> Topology:
    """The generation of a slice `v5e:2x4`.

    Raises:
        BicacheError: it is unknown.
    """
    generation = name.split(":")[0]
    if generation not in names("topologies"):
        raise BicacheError(f"topology {name!r}: generations are {', '.join(names('topologies'))}")
    return Topology(**_read("topologies", generation))


@functools.cache  # every plan asks
def topology_of(device_kind: str) -> Topology | None:
    """The TPU generation that a device is of; None for anything else."""
    known = (topology(name) for name in names("topologies"))
    return next((one for one in known if one.device_kind == device_kind), None)


def published_table(config: ModelConfig) -> BoundaryTable | None:
    """The published boundary table for a checkpoint of LLaDA-8B's or Dream-7B's architecture; None for others."""
    shape = ("family", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_mlp")
    for name in names("boundary"):
        published = model_shape(name)
        if all(getattr(config, field) == getattr(published, field) for field in shape):
            return table_from_json(_read("boundary", name), f"configs/boundary/{name}.json")
    return None
