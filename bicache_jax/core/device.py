"""What the planner knows about a device."""

from __future__ import annotations

import dataclasses


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
