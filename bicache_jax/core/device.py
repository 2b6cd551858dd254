"""What the planner knows about a device."""

from __future__ import annotations

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Copies:
    """What a compiler keeps in memory in addition to a program's own arrays.

    Attributes:
        mlp: activations as wide as the MLP held at the same time: gate and up, unless the compiler fuses their product.
        weights: copies of all parameters.
    """

    mlp: int = 2
    weights: int = 0


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device.

    Attributes:
        nbytes: its memory.
        copies: what its compiler keeps in addition to a program's arrays.
    """

    nbytes: int
    copies: Copies = Copies()


def compute_capability(device: Any) -> float | None:
    """What a GPU is capable of, as NVIDIA counts it: 7.5 of a T4, 8.0 of an A100; None for what is no such GPU."""
    try:
        return float(device.compute_capability)
    except (AttributeError, TypeError, ValueError):
        return None


LEAST_CAPABILITY = 8.0
"""Compute capability from which GPUs have bfloat16, and Triton's kernels run."""


def file_name(kind: str) -> str:
    """A kind of device, as jax names it, in a form that any file may be named: `NVIDIA H200` gives `nvidia_h200`."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
