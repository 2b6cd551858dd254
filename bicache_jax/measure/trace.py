"""A profile of a call, summed up: which operations take the device's time, and how long it waits."""

from __future__ import annotations

import collections
import dataclasses
import glob
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

_DEVICE = re.compile(r"^/device:(?!CUSTOM)")
_HOST = re.compile(r"XLA|Xla|xla|tf_", re.ASCII)  # the threads on which CPU programs run
_NUMBER = re.compile(r"(\.\d+)+$")
_NOISE = re.compile(r"^end: |Threadpool|ThreadPool|^ThunkExecutor")  # of CPU threads
_SPANS = ("Steps", "XLA Modules", "Framework Ops", "Framework Name Scope", "Source code")  # they span operations

Event = tuple[str, float, float]
"""Name of an operation, its begin and its duration in nanoseconds."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """Operations of one name.

    Attributes:
        name: their name, numbers at its end left out.
        seconds: their time.
        count: how many ran.
    """

    name: str
    seconds: float
    count: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a device did.

    Attributes:
        span: seconds from the first operation to the end of the last one.
        busy: seconds in which at least one operation ran.
        operations: by name, those that took longest first.
    """

    span: float
    busy: float
    operations: tuple[Operation, ...]

    @property
    def idle(self) -> float:
        """Share of the span in which nothing ran."""
        return 1 - self.busy / self.span if self.span else 0.0


def unsafe() -> str | None:
    """Why this process must not be profiled; None if it may.

    A TPU compiler that is loaded beside another device's runtime takes part in every profile, and one of another
    release than jaxlib expects ends the process.
    """
    maps = Path("/proc/self/maps")
    if jax.default_backend() != "tpu" and maps.exists() and b"libtpu" in maps.read_bytes():
        return "the TPU compiler is loaded, and there is no TPU"
    return None


def traced(call: Callable[[], object]) -> Summary | None:
    """Runs a call under `jax.profiler` and sums up what the first device did; None where the trace shows nothing.

    On CPUs that is what ran on the compiler's threads. Ask `unsafe` first.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        files = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        if not files:
            return None
        planes = sorted(jax.profiler.ProfileData.from_file(files[0]).planes, key=lambda plane: plane.name)
        device = next((plane for plane in planes if _DEVICE.match(plane.name)), None)
        if device is not None:
            lines = [line for line in device.lines if line.name not in _SPANS]
        else:
            lines = [line for plane in planes for line in plane.lines if _HOST.search(line.name)]
        events = [[(event.name, event.start_ns, event.duration_ns) for event in line.events] for line in lines]
    return summary(events)


def summary(lines: Iterable[Iterable[Event]]) -> Summary | None:
    """Sums up what ran on a device.

    Args:
        lines: events of each of its queues or threads. One that lies within another (a loop's body in the loop) is not
            the outer one's own time.

    Returns:
        The summary; None if there are no events.
    """
    own: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    spans: list[tuple[float, float]] = []
    for line in lines:
        events = [event for event in line if event[2] > 0 and not _NOISE.search(event[0])]
        outer: list[tuple[str, float]] = []  # name and end of the events that the current one lies in
        for name, begin, duration in sorted(events, key=lambda event: (event[1], -event[2])):
            name = _NUMBER.sub("", name)
            while outer and outer[-1][1] <= begin:
                outer.pop()
            if outer:
                own[outer[-1][0]] -= int(duration)
            own[name] += int(duration)
            counts[name] += 1
            outer.append((name, begin + duration))
            spans.append((begin, begin + duration))
    if not spans:
        return None
    spans.sort()
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    operations = [Operation(name, nanoseconds / 1e9, counts[name]) for name, nanoseconds in own.most_common()]
    return Summary((reached - spans[0][0]) / 1e9, busy / 1e9, tuple(operations))
