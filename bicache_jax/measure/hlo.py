"""Collectives of a compiled program, read from its HLO text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_INSTRUCTION = re.compile(rf"= (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_LISTED = re.compile(r"replica_groups=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<pairs>(?:\{\d+,\d+\},?)*)\}")
_ARRAY = re.compile(r"(?P<kind>pred|[a-z]+)(?P<bits>\d*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: its opcode.
        groups: groups of devices that communicate, by index in the mesh; empty: all devices.
        nbytes: bytes of its result on a device.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    nbytes: int


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    if found := _LISTED.search(line) or _PAIRS.search(line):
        return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", found[0]))
    if found := _IOTA.search(line):
        devices = np.arange(math.prod(_numbers(found["dims"]))).reshape(_numbers(found["dims"]))
        if found["order"]:
            devices = devices.transpose(_numbers(found["order"]))
        return tuple(tuple(map(int, group)) for group in devices.reshape(_numbers(found["shape"])))
    return ()


def _nbytes(text: str) -> int:
    sizes = []
    for found in _ARRAY.finditer(text):
        bits = 8 if found["kind"] == "pred" else int(found["bits"] or 0)
        sizes.append(bits * math.prod(_numbers(found["shape"])) // 8)
    return sum(sizes)


def collectives(text: str) -> list[Collective]:
    """Reads the collectives of a program.

    Args:
        text: the result of `compiled.as_text()`.

    Returns:
        One entry per instruction; an instruction in a loop is listed once.
    """
    return [
        Collective(found["kind"], _groups(line), _nbytes(found["type"]))
        for line in text.splitlines()
        if (found := _INSTRUCTION.search(line))
    ]


def crossing(found: Sequence[Collective], mesh_shape: tuple[int, ...]) -> list[Collective]:
    """Collectives between devices of different data shards of a mesh `("data", "model")`."""
    data, model = mesh_shape
    if data == 1:
        return []
    return [
        one
        for one in found
        if not one.groups or any(len({device // model for device in group}) > 1 for group in one.groups)
    ]
