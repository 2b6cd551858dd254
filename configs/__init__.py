"""Settings kept as data: model shapes, boundary tables, TPU generations, presets (`bicache_jax.cli.presets`)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from bicache_jax.core.boundary import BoundaryTable, table_from_json
from bicache_jax.core.config import Experts, ModelConfig
from bicache_jax.core.device import Copies
from bicache_jax.core.types import BicacheError


def _read(folder: str, name: str) -> Any:
    return json.loads((importlib.resources.files(__name__) / folder / f"{name}.json").read_bytes())


def names(folder: str) -> list[str]:
    """Names of the files in a folder (`models`, `boundary`, `topologies`)."""
    entries = (importlib.resources.files(__name__) / folder).iterdir()
    return sorted(entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json"))


def model_shape(name: str) -> ModelConfig:
    """A published architecture (`llada_8b`, `dream_7b`), or `small`, which runs on CPUs.

    Raises:
        BicacheError: the name is unknown.
    """
    if name not in names("models"):
        raise BicacheError(f"no model shape {name!r}; there are {', '.join(names('models'))}")
    fields = _read("models", name)
    experts = fields.get("experts")
    if experts is not None:
        experts = Experts(**experts | {"dense_layers": tuple(experts.get("dense_layers", ()))})
    return ModelConfig(**fields | {"eos_ids": tuple(fields["eos_ids"]), "experts": experts})


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU generation. Figures are per device; some generations have two devices on a chip.

    Attributes:
        platform: name of the generation, as in `v5e:2x4`.
        hbm_gib: memory that programs can use.
        tflops_bfloat16: peak arithmetic in 10^12 operations per second.
        hbm_gb_per_second: memory bandwidth in 10^9 bytes per second.
        ici_gb_per_second: bandwidth of a chip's links to other chips, both directions together.
        ici_ports: how many links those are: 4 in a 2D torus, 6 in a 3D one.
        devices_per_chip: number of JAX devices per chip.
        device_kind: JAX's name for the device.
        mlp_copies: activations as wide as the MLP that its compiler keeps at the same time (`scripts/what_fits.py`).
        weight_copies: copies of all parameters that its compiler makes before a program; TPU7x changes their tiling.
        source: source of the figures.
    """

    platform: str
    hbm_gib: float
    tflops_bfloat16: float
    hbm_gb_per_second: float
    ici_gb_per_second: float
    ici_ports: int
    devices_per_chip: int
    device_kind: str
    mlp_copies: int
    weight_copies: int
    source: str

    def all_reduce_seconds(self, nbytes: float, devices: int) -> float:
        """Lower bound of the time of an all-reduce along one axis of the torus.

        A ring sends `2 (n - 1) / n` of the bytes out of each device, on the axis's two links in both directions; the
        devices of a chip share its links.

        Args:
            nbytes: bytes of the result on a device.
            devices: n, devices that take part.
        """
        if devices < 2:
            return 0.0
        links = self.ici_gb_per_second / self.ici_ports * 1e9  # two of them, each with half of a port's for one way
        return 2 * (devices - 1) / devices * nbytes * self.devices_per_chip / links

    @property
    def copies(self) -> Copies:
        """What its compiler keeps in memory in addition to a program's arrays."""
        return Copies(self.mlp_copies, self.weight_copies)


def topology(name: str) -> Topology:
    """The generation of a slice such as `v5e:2x4`.

    Raises:
        BicacheError: the generation is unknown.
    """
    generation = name.split(":")[0]
    if generation not in names("topologies"):
        raise BicacheError(f"topology {name!r}: generations are {', '.join(names('topologies'))}")
    return Topology(**_read("topologies", generation))


@functools.cache  # every plan calls it
def topology_of(device_kind: str) -> Topology | None:
    """The TPU generation of a device; None for any other device."""
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
