"""How fast is the device that is there? The measurements of `bicache doctor --full`, the most important first."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax.core.config import SamplingConfig
from bicache_jax.core.types import Model
from bicache_jax.measure import benchmark, kernel_times, torch_baseline, trace
from bicache_jax.measure.benchmark import Case, EngineRunner, Runner
from bicache_jax.measure.doctor import Check, Clock, Status
from bicache_jax.measure.kernel_times import Shape, Timing, line
from bicache_jax.measure.torch_baseline import TorchRunner
from bicache_jax.serving.compilation import kept_in
from bicache_jax.testing import platform_here, save_rows

POLICIES = ("none", "bicache", "none+dual", "bicache+dual")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes that a device gets through in minutes.

    Attributes:
        shapes: of attention.
        models: names of model shapes; random weights.
        prefix: P.
        suffix: U.
        response: response tokens.
        block: tokens of a block, where there is a block cache.
        rows: rows of a batch, each timed.
        dtype: of the models.
    """

    shapes: tuple[Shape, ...]
    models: tuple[str, ...]
    prefix: int
    suffix: int
    response: int
    block: int
    rows: tuple[int, ...]
    dtype: str


LARGE = Scale(kernel_times.SHAPES, ("llada_8b", "dream_7b"), 1024, 512, 256, 32, (8, 32), "bfloat16")
TINY = Scale(
    (Shape("a suffix", 2, 1, 2, 2, 16, 32, 16, 16, "float32"), Shape("a block", 2, 1, 2, 2, 16, 32, 4, 16, "float32")),
    ("small",),
    64,
    32,
    16,
    8,
    (2,),
    "float32",
)
MOST = 15
"""Operations of a profile that are kept, those that took longest."""
ENOUGH = 24 * 2**30
"""Bytes of a device that holds 8B parameters in bfloat16 and their caches."""


def scale_here() -> Scale:
    """The scale of this process's device: models of 8B where they fit, sizes of a CPU elsewhere."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if jax.default_backend() == "cpu":
        return TINY
    return LARGE if limit >= ENOUGH else dataclasses.replace(LARGE, models=("small",))


def measurements(
    make: Callable[[str, str], Model], clock: Clock, scale: Scale, *, save_tuning: bool
) -> Iterator[Check]:
    """Kernels, then whole runs, then where their time goes.

    Args:
        make: makes a model of a named shape and dtype with random weights.
        clock: no measurement starts when it is spent.
        scale: sizes.
        save_tuning: keep the fastest block sizes for this kind of device.

    Yields:
        A check after every measurement; one that fails is wrong, and the others run.
    """
    bandwidth = benchmark.memory_bandwidth()
    yield from kernels(clock, scale, bandwidth, save_tuning=save_tuning)
    for name in scale.models:
        yield from runs(make, name, clock, scale, bandwidth)
    yield from details(make, clock, scale)


def kernels(clock: Clock, scale: Scale, bandwidth: float, *, save_tuning: bool) -> Iterator[Check]:
    """Times every way to compute prefix attention; the fastest are the rows of a tuning table."""
    platform = platform_here()
    peaks = {dtype: _peak(dtype) for dtype in sorted({shape.dtype for shape in scale.shapes})}
    timings: list[Timing] = []
    for shape in scale.shapes:
        if clock.left < 0:
            yield Check("kernels", shape.name, "skipped", "no time is left; --budget gives more")
            continue
        for timing in kernel_times.times([shape], platform, peaks, bandwidth):
            timings.append(timing)
            facts = dataclasses.asdict(timing)
            if timing.seconds is None or timing.roofline is None:
                # A candidate that this device cannot run is no fault: another one serves.
                status: Status = "skipped" if timing.row is not None else "wrong"
                yield Check("kernels", f"{shape.name}: {timing.form}", status, timing.error or "", facts)
                continue
            detail = f"{timing.seconds * 1e3:.3f} ms, {timing.roofline:.0%} of the roofline"
            yield Check("kernels", f"{shape.name}: {timing.form}", "ok", detail, facts)
    rows = kernel_times.best_rows(timings, platform)
    for row in rows:
        yield Check("kernels", "fastest", "ok", f"{_sizes(row)}; {row['reason']}", {"row": row})
    if save_tuning and rows:
        facts = {"jax": jax.__version__, "bandwidth": bandwidth if math.isfinite(bandwidth) else None, "peaks": peaks}
        try:
            path = save_rows(platform, jax.devices()[0].device_kind, rows, facts)
        except OSError as fault:
            yield Check("kernels", "tuning table", "wrong", line(fault))
        else:
            yield Check(
                "kernels", "tuning table", "ok", f"kept in {path}: the next process reads it", {"path": str(path)}
            )
    elif save_tuning:
        yield Check("kernels", "tuning table", "skipped", "this platform has no kernel to tune")


def _sizes(row: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items() if name != "reason")


def _peak(dtype: str) -> float:
    product = benchmark.matmul_peak(jnp.dtype(dtype))
    return max(product() for _ in range(3))


def runs(make: Callable[[str, str], Model], name: str, clock: Clock, scale: Scale, bandwidth: float) -> Iterator[Check]:
    """Runs a random model under each policy, in turns, as `bicache benchmark` does."""
    if clock.left < 0:
        yield Check("runs", name, "skipped", "no time is left; --budget gives more")
        return
    try:
        model = make(name, scale.dtype)
    except Exception as fault:
        yield Check("runs", name, "wrong", line(fault))
        return
    without = torch_baseline.missing(model)
    for rows in scale.rows:
        if clock.left < 0:
            yield Check("runs", f"{name}, {rows} rows", "skipped", "no time is left; --budget gives more")
            continue
        others = () if without or rows != scale.rows[0] else torch_baseline.BASELINES
        cases = [_case(policy, rows, scale) for policy in (*POLICIES, *others)]
        yield from _timed(model, name, cases, clock, bandwidth)
    if without:
        yield Check("runs", f"{name}, PyTorch", "skipped", without)


def _case(policy: str, rows: int, scale: Scale) -> Case:
    """A case in 16 steps, fewer where there are fewer tokens."""
    block = scale.block if "+" in policy else scale.response
    sampling = SamplingConfig(gen_length=scale.response, steps=min(16, scale.response), block_length=block)
    return Case(policy, scale.prefix, scale.suffix, rows, 1, 16, "auto", sampling)


def _timed(model: Model, name: str, cases: Sequence[Case], clock: Clock, bandwidth: float) -> Iterator[Check]:
    runners: list[Runner] = []
    run: list[Case] = []
    for case in cases:
        title = f"{name}, {case.rows} rows, {case.policy}"
        if clock.left < 0:
            yield Check("runs", title, "skipped", "no time is left; --budget gives more")
            continue
        try:
            baseline = case.policy in torch_baseline.BASELINES
            runner: Runner = TorchRunner(model, case) if baseline else EngineRunner(model, case)
            runner.prepare()
        except Exception as fault:
            yield Check("runs", title, "wrong", line(fault))
            continue
        runners.append(runner)
        run.append(case)
    if not run:
        return
    times, firsts, peak = benchmark.measure(
        runners, peak=benchmark.matmul_peak(model.dtype), repeats=3, seconds=max(1, clock.left)
    )
    records = benchmark.report(
        model.config,
        run,
        runners,
        times,
        firsts,
        peak=peak,
        bandwidth=bandwidth,
        itemsize=model.dtype.itemsize,
    )
    plain = next((record["tokens_per_s"] for record in records if record["policy"] == "none"), None)
    for record in records:
        if plain is not None:  # with a block cache the blocks differ, and the tokens are as many
            record["ratio_to_none"] = round(float(record["tokens_per_s"]) / float(plain), 4)
            if record["limit"] is not None:
                record["limit_share"] = round(record["ratio_to_none"] / record["limit"], 4)
        detail = f"{record['tokens_per_s']:.1f} tokens/s, mfu {record['mfu']:.2f}"
        if plain is not None:
            detail += f", {record['ratio_to_none']:.2f} times none"
        if record["limit_share"] is not None:
            detail += f", {record['limit_share']:.2f} of its limit"
        facts = {key: value.item() if hasattr(value, "item") else value for key, value in record.items()}
        yield Check("runs", f"{name}, {record['rows']} rows, {record['policy']}", "ok", detail, facts)


def details(make: Callable[[str, str], Model], clock: Clock, scale: Scale) -> Iterator[Check]:
    """What a dispatch costs, what compiling costs, and which operations a run's time goes to."""
    group = "details"
    if clock.left < 0:
        yield Check(group, "dispatch, compilation, profile", "skipped", "no time is left; --budget gives more")
        return
    dispatch, answer = dispatch_seconds()
    detail = f"{dispatch * 1e6:.0f} us to start a program, {answer * 1e6:.0f} us until its result is here"
    yield Check(group, "dispatch", "ok", detail, {"dispatch_s": dispatch, "answer_s": answer})
    title = f"{scale.models[0]}, {scale.rows[0]} rows, bicache"
    try:
        runner = EngineRunner(make(scale.models[0], scale.dtype), _case("bicache", scale.rows[0], scale))
        cold, warm = compile_seconds(runner)
        yield Check(
            group,
            f"compilation: {title}",
            "ok",
            f"{cold:.1f} s cold, {warm:.1f} s with the programs on disk, up to the first token",
            {"cold_s": cold, "warm_s": warm},
        )
        if why := trace.unsafe():
            yield Check(group, f"profile: {title}", "skipped", why)
            return
        seen = trace.traced(runner.run)
    except Exception as fault:
        yield Check(group, title, "wrong", line(fault))
        return
    if seen is None:
        yield Check(group, f"profile: {title}", "skipped", "the trace of this device shows no operation")
        return
    most = [dataclasses.asdict(operation) for operation in seen.operations[:MOST]]
    names = ", ".join(f"{one['name']} {one['seconds'] / seen.busy:.0%}" for one in most[:5])
    facts = {"span_s": seen.span, "busy_s": seen.busy, "operations": most}
    yield Check(group, f"profile: {title}", "ok", f"idle {seen.idle:.0%} of {seen.span:.2f} s; {names}", facts)


def dispatch_seconds(times: int = 200) -> tuple[float, float]:
    """Seconds to start a small program with as many arrays as a dispatch has, and until its result is read."""
    arrays = [jnp.zeros((8,), jnp.float32) for _ in range(20)]
    program = jax.jit(lambda arrays: [array + 1 for array in arrays])
    arrays = jax.block_until_ready(program(arrays))
    started = time.perf_counter()
    for _ in range(times):
        arrays = program(arrays)
    begun = (time.perf_counter() - started) / times
    jax.block_until_ready(arrays)
    started = time.perf_counter()
    for _ in range(times):
        arrays = program(arrays)
        np.asarray(arrays[0])
    return begun, (time.perf_counter() - started) / times


def compile_seconds(runner: EngineRunner) -> tuple[float, float]:
    """Seconds up to the first token with no compiled program, and with all of them in a persistent cache only."""
    found = []
    with tempfile.TemporaryDirectory() as folder, kept_in(folder):
        for _ in range(2):
            jax.clear_caches()
            found.append(runner.first_token())
    return found[0], found[1]
