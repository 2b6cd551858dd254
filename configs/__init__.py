"""Settings kept as data: model shapes, boundary tables, TPU generations, GPUs, presets (`bicache_jax.cli.presets`)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from bicache_jax.core.boundary import BoundaryTable, table_from_json
from bicache_jax.core.config import Experts, ModelConfig
from bicache_jax.core.device import Copies
from bicache_jax.core.types import BicacheError

D = TypeVar("D", bound="Device")


def _read(folder: str, name: str) -> Any:
    return json.loads((importlib.resources.files(__name__) / folder / f"{name}.json").read_bytes())


def names(folder: str) -> list[str]:
    """Names of the files in a folder (`models`, `boundary`, `topologies`, `gpus`)."""
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
class Device:
    """A kind of device; its figures are those that its maker publishes.

    Attributes:
        memory_gib: memory. Of TPUs what programs can use, of GPUs all that there is.
        memory_share: share of it that JAX gives to programs if it is not told otherwise.
        tera_per_second: peak arithmetic in 10^12 operations per second, by the type of what is multiplied, without
            sparsity. A type that is missing has no peak of its own: matrix units do not take it, or nobody says.
        memory_gb_per_second: memory bandwidth in 10^9 bytes per second.
        device_kinds: JAX's names for the device.
        mlp_copies: activations as wide as the MLP that its compiler keeps at the same time (`scripts/what_fits.py`).
        weight_copies: copies of all parameters that its compiler makes before a program; TPU7x changes their tiling.
        source: source of the figures.
    """

    memory_gib: float
    memory_share: float
    tera_per_second: Mapping[str, float] = dataclasses.field(hash=False)
    memory_gb_per_second: float
    device_kinds: tuple[str, ...]
    mlp_copies: int
    weight_copies: int
    source: str

    @property
    def dtype(self) -> str:
        """The 16-bit type in which it multiplies: `bfloat16` where that exists, else `float16`."""
        return "bfloat16" if "bfloat16" in self.tera_per_second else "float16"

    @property
    def copies(self) -> Copies:
        """What its compiler keeps in memory in addition to a program's arrays."""
        return Copies(self.mlp_copies, self.weight_copies)

    def peak(self, dtype: str) -> float:
        """Operations per second with operands of a type.

        Raises:
            BicacheError: no peak is known.
        """
        if dtype not in self.tera_per_second:
            known = ", ".join(self.tera_per_second)
            raise BicacheError(f"{self.device_kinds[0]}: no peak is published for {dtype}, only for {known}")
        return self.tera_per_second[dtype] * 1e12

    def all_reduce_seconds(self, nbytes: float, devices: int) -> float:
        """Lower bound of the time of an all-reduce.

        Args:
            nbytes: bytes of the result on a device.
            devices: n, devices that take part.

        Raises:
            BicacheError: the speed of the links is not known.
        """
        raise NotImplementedError


def _ring_seconds(nbytes: float, devices: int, bytes_per_second: float) -> float:
    """A ring sends `2 (n - 1) / n` of the bytes out of each device."""
    return 2 * (devices - 1) / devices * nbytes / bytes_per_second


@dataclasses.dataclass(frozen=True)
class Gpu(Device):
    """A GPU.

    Attributes:
        link_gb_per_second: bandwidth of its links to the other GPUs of a machine, both directions together; None: it
            has none of its own.
    """

    link_gb_per_second: float | None

    def all_reduce_seconds(self, nbytes: float, devices: int) -> float:
        """Lower bound of the time of an all-reduce over switched links: half of their speed for each direction."""
        if devices < 2:
            return 0.0
        if self.link_gb_per_second is None:
            raise BicacheError(f"{self.device_kinds[0]}: it has no links to other GPUs whose speed is published")
        return _ring_seconds(nbytes, devices, self.link_gb_per_second / 2 * 1e9)


@dataclasses.dataclass(frozen=True)
class Topology(Device):
    """A TPU generation. Figures are per device; some generations have two devices on a chip.

    Attributes:
        platform: name of the generation, as in `v5e:2x4`.
        ici_gb_per_second: bandwidth of a chip's links to other chips, both directions together.
        ici_ports: how many links those are: 4 in a 2D torus, 6 in a 3D one.
        devices_per_chip: number of JAX devices per chip.
    """

    platform: str
    ici_gb_per_second: float
    ici_ports: int
    devices_per_chip: int

    def all_reduce_seconds(self, nbytes: float, devices: int) -> float:
        """Lower bound of the time of an all-reduce along one axis of the torus.

        It uses the axis's two links in both directions; the devices of a chip share its links.
        """
        if devices < 2:
            return 0.0
        links = self.ici_gb_per_second / self.ici_ports * 1e9  # two of them, each with half of a port's for one way
        return _ring_seconds(nbytes * self.devices_per_chip, devices, links)


def _device(kind: type[D], folder: str, name: str) -> D:
    fields = _read(folder, name)
    return kind(**fields | {"device_kinds": tuple(fields["device_kinds"])})


def topology(name: str) -> Topology:
    """The generation of a slice such as `v5e:2x4`.

    Raises:
        BicacheError: the generation is unknown.
    """
    generation = name.split(":")[0]
    if generation not in names("topologies"):
        raise BicacheError(f"topology {name!r}: generations are {', '.join(names('topologies'))}")
    return _device(Topology, "topologies", generation)


def device(name: str) -> tuple[Device, int]:
    """A kind of device, and how many of JAX's devices a name stands for.

    Args:
        name: a GPU (`t4`, `h100`) or a TPU generation (`v5e`), also several: `h100-8`, `v5e-8`, `v5e:2x4`.

    Raises:
        BicacheError: there is no such device.
    """
    found = re.fullmatch(r"(\w+)(?:-([1-9]\d*)|:([1-9]\d*(?:x[1-9]\d*)*))?", name)
    if found is not None:
        chips = math.prod(int(side) for side in (found[2] or found[3] or "1").split("x"))
        if found[1] in names("topologies"):
            generation = topology(found[1])
            return generation, chips * generation.devices_per_chip
        if found[1] in names("gpus"):
            return _device(Gpu, "gpus", found[1]), chips
    known = ", ".join([*names("gpus"), *names("topologies")])
    raise BicacheError(f"device {name!r}: devices are {known}; several are h100-8, v5e-8 or v5e:2x4")


@functools.cache  # every plan calls it
def device_of(device_kind: str) -> Device | None:
    """What is known of a device, by JAX's name for it; None: nothing."""
    known = (device(name)[0] for folder in ("topologies", "gpus") for name in names(folder))
    return next((one for one in known if device_kind in one.device_kinds), None)


def published_table(config: ModelConfig) -> BoundaryTable | None:
    """The published boundary table for a checkpoint of LLaDA-8B's or Dream-7B's architecture; None for others."""
    shape = ("family", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_mlp")
    for name in names("boundary"):
        published = model_shape(name)
        if all(getattr(config, field) == getattr(published, field) for field in shape):
            return table_from_json(_read("boundary", name), f"configs/boundary/{name}.json")
    return None
