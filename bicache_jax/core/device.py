"""What a device offers to a plan."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Copies:
    """What a compiler holds besides the arrays that a program names.

    Attributes:
        mlp: activations as wide as the MLP at a time: gate and up, unless they are multiplied as they come.
        weights: copies of all parameters.
    """

    mlp: int = 2
    weights: int = 0


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """What a device offers to a plan.

    Attributes:
        nbytes: its memory.
        copies: what its compiler holds.
    """

    nbytes: int
    copies: Copies = Copies()
