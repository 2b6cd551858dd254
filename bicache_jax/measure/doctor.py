"""Is everything right on the device that is there, and how fast is it? The checks of `bicache doctor`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bicache_jax import testing
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.device import file_name
from bicache_jax.core.types import BicacheError, Model
from bicache_jax.core.version import release
from bicache_jax.measure import aot
from bicache_jax.measure.benchmark import device_name, matmul_peak, memory_bandwidth
from bicache_jax.measure.kernel_times import line
from bicache_jax.measure.policies import parse_policy
from bicache_jax.serving.engine import Engine
from bicache_jax.testing import AttentionCase

Status = Literal["ok", "wrong", "skipped"]

PACKAGES = ("bicache-jax", "jax", "jaxlib", "flax", "numpy", "libtpu")
INTERPRETED = (testing.SMALL_CASES[0], testing.SMALL_CASES[3])
"""Cases for kernels of another platform, in Pallas's interpreter."""
_TPU_CASE = aot.AotCase(
    config="small", topology="v5e:1", mesh="data=1,model=1", prefix=128, suffix=64, gen_length=32, rows=2, boundary=4
)
COMPILER_SECONDS = 45
"""What a compilation for a TPU that is not here takes on two slow cores; it is left out when less time remains."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        part: `environment`, `attention`, `answers`, `speed`, `compiler`; `kernels` and `runs` where all is measured.
        name: what was checked.
        status: `wrong` makes the command fail; `skipped` says in `detail` why.
        detail: a line for people.
        facts: the same for programs; JSON values only.
    """

    part: str
    name: str
    status: Status
    detail: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Clock:
    """What is left of a budget."""

    def __init__(self, seconds: float) -> None:
        """Starts it."""
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when it is spent."""
        return self._end - time.monotonic()


def checks(load: Callable[[], Model], recorded: Path, clock: Clock) -> Iterator[Check]:
    """Runs all checks in the order of their importance.

    Args:
        load: loads the bundled model.
        recorded: its recorded answers.
        clock: what no longer fits is skipped and says so.

    Yields:
        Each check as soon as it is done. A check that raises is wrong; those after it still run.

    Raises:
        BicacheError: jax has no device that works.
    """
    try:
        jax.devices()
    except RuntimeError as error:
        raise BicacheError(f"jax finds no device: {error}") from error
    yield from environment()
    yield from attention(clock)
    yield from answers(load, recorded)
    yield from speed(clock)
    yield from compiler(clock)


def environment() -> Iterator[Check]:
    """Versions, devices, memory, and which attention serves here."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        if importlib.util.find_spec(package.replace("-", "_")) is not None:
            versions[package] = release(package) or "not installed, from a folder"
    yield Check("environment", "versions", "ok", ", ".join(f"{k} {v}" for k, v in versions.items()), versions)

    devices = jax.local_devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    memory = f", {limits[0] / 2**30:.1f} GiB each for jax" if limits[0] else ""
    yield Check(
        "environment",
        "devices",
        "ok",
        f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()}){memory}",
        {
            "platform": jax.default_backend(),
            "kind": devices[0].device_kind,
            "name": device_name(),
            "count": len(devices),
            "bytes_limit": limits[0],
            "cores": os.cpu_count(),
        },
    )

    kernel = testing.kernel_here()
    detail = f"{kernel}, the Pallas kernel of this platform" if kernel else "plain JAX: this platform has no kernel"
    yield Check("environment", "attention of --attention auto", "ok", detail, {"serves": kernel or "xla"})


def _attention_runs() -> Iterator[tuple[AttentionCase, str, bool]]:
    """(case, implementation, interpreted), the most important first."""
    kernel = testing.kernel_here()
    if kernel is not None:
        for case in testing.DEVICE_CASES:
            yield case, kernel if testing.refused(case, kernel) is None else "auto", False
    yield from ((case, "xla", False) for case in testing.SMALL_CASES)
    if kernel is None:
        yield from ((case, name, True) for name in testing.kernels() for case in INTERPRETED)


def attention(clock: Clock) -> Iterator[Check]:
    """Every implementation of prefix attention that runs here, against float64."""
    for case, implementation, interpret in _attention_runs():
        name = f"{implementation}{', interpreted' if interpret else ''}: {case}"
        if clock.left < 0:
            yield Check("attention", name, "skipped", "no time is left; --budget gives more")
            continue
        call = functools.partial(testing.prefix_attention, implementation=implementation, interpret=interpret)
        try:
            error = testing.error_over_bound(testing.attend(case, call), testing.exact(case), case.dtype)
        except Exception as fault:  # whatever a compiler or a driver raises
            yield Check("attention", name, "wrong", line(fault))
            continue
        bound = testing.BOUNDS[case.dtype]
        yield Check(
            "attention",
            name,
            "ok" if error <= 1 else "wrong",
            f"largest error {error:.2f} of the bound ({bound:g})",
            {"implementation": implementation, "interpreted": interpret, "bound": bound, "error_over_bound": error}
            | dataclasses.asdict(case),
        )


def answers(load: Callable[[], Model], recorded: Path) -> Iterator[Check]:
    """The bundled model's tokens, against those that were recorded on a CPU.

    Only answers are recorded whose tokens no rounding changes (`scripts/record_answers.py`), so they must be equal.
    """
    try:
        model, kept = load(), json.loads(recorded.read_text(encoding="utf-8"))
    except (BicacheError, OSError, ValueError) as fault:
        yield Check("answers", "the bundled model", "wrong", line(fault))
        return
    for policy, wanted in kept["answers"].items():
        try:
            found = answer(model, kept["requests"], policy, kept["sampling"])
        except Exception as fault:
            yield Check("answers", policy, "wrong", line(fault))
            continue
        differ = [index for index, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
        yield Check(
            "answers",
            policy,
            "wrong" if differ else "ok",
            f"{len(differ)} of {len(wanted)} answers differ from the recorded ones: {differ}"
            if differ
            else f"all {len(wanted)} answers equal the recorded ones",
            {"policy": policy, "answers": len(wanted), "differ": differ},
        )


def answer(
    model: Model, requests: Sequence[Mapping[str, Any]], policy: str, sampling: Mapping[str, Any]
) -> list[list[int]]:
    """Response tokens of each request under a policy, as `bicache evaluate` names them."""
    engine = Engine(model, cache=parse_policy(policy, CacheConfig()), sampling=SamplingConfig(**sampling))
    return [list(map(int, result.token_ids)) for result in engine.generate([dict(request) for request in requests])]


def speed(clock: Clock) -> Iterator[Check]:
    """The peak of large matrix products by dtype, and the bandwidth of the memory."""
    for dtype in ("float32", "bfloat16", "int8"):
        name = f"matrix products, {dtype}"
        if clock.left < 0:
            yield Check("speed", name, "skipped", "no time is left; --budget gives more")
            continue
        try:
            product = matmul_peak(jnp.dtype(dtype))
            peak = max(product() for _ in range(3))
        except Exception as fault:
            yield Check("speed", name, "wrong", line(fault))
            continue
        yield Check("speed", name, "ok", f"{_readable(peak)}op/s", {"dtype": dtype, "operations_per_s": peak})
    bandwidth = memory_bandwidth()
    if math.isinf(bandwidth):
        yield Check("speed", "memory", "skipped", "a CPU's caches make one number meaningless")
    else:
        yield Check("speed", "memory", "ok", f"{_readable(bandwidth)}B/s", {"bytes_per_s": bandwidth})


def compiler(clock: Clock) -> Iterator[Check]:
    """Programs compiled for a TPU that is not here, where the TPU compiler is."""
    name = "decode for a TPU v5e"
    if importlib.util.find_spec("libtpu") is None:
        yield Check("compiler", name, "skipped", "the TPU compiler is not installed (pip install libtpu)")
        return
    here, late = jax.default_backend() == "tpu", clock.left < COMPILER_SECONDS
    if here or late:
        yield Check("compiler", name, "skipped", "a TPU is here" if here else "no time is left; --budget gives more")
        return
    try:
        found = aot.check(_TPU_CASE)
    except Exception as fault:
        yield Check("compiler", name, "wrong", line(fault))
        return
    yield Check("compiler", name, "ok", "compiles", {"fits": bool(found["fits"])})


def _readable(number: float) -> str:
    power = max(0, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.3g} {' kMGTP'[power].strip()}"


def report(found: Sequence[Check]) -> dict[str, Any]:
    """All checks as one JSON object."""
    return {
        "ok": all(check.status != "wrong" for check in found),
        "checks": [dataclasses.asdict(check) for check in found],
    }


def write(found: Sequence[Check], folder: str | Path) -> Path:
    """Writes the report as `<kind of device>.json` and, for people, `.md`; each as a whole or not at all.

    Returns:
        The JSON file.

    Raises:
        BicacheError: the folder cannot be written.
    """
    path = Path(folder) / f"{file_name(jax.devices()[0].device_kind)}.json"
    texts = {path: json.dumps(report(found), indent=1) + "\n", path.with_suffix(".md"): _table(found)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, text in texts.items():
            part = target.with_name(target.name + ".part")
            part.write_text(text, encoding="utf-8")
            part.replace(target)
    except OSError as error:
        raise BicacheError(f"--output {folder}: cannot write {path}: {error.strerror}") from error
    return path


def _table(found: Sequence[Check]) -> str:
    """The checks in Markdown, a table for each part."""
    lines = [f"# {jax.devices()[0].device_kind}"]
    part = ""
    for check in found:
        if check.part != part:
            part = check.part
            lines += ["", f"## {part.capitalize()}", "", "| check | | found |", "|---|---|---|"]
        lines.append(f"| {check.name} | {check.status} | {check.detail.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
