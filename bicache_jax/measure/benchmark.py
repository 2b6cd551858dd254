"""What a policy gives on this machine, and how much of what is possible that is.

All settings are measured in one process, in turns, so that a slow minute of a shared machine hits every policy alike;
ratios are taken within a turn.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax.core.config import CacheConfig, ModelConfig, SamplingConfig
from bicache_jax.core.types import BicacheError, Model, Request
from bicache_jax.measure.policies import parse_policy
from bicache_jax.serving.engine import Engine
from bicache_jax.serving.flops import Job, gain_limit, jobs, row_flops
from bicache_jax.serving.grouping import prefix_ratio
from bicache_jax.serving.planner import cache_for
from bicache_jax.serving.programs import lower_decode
from bicache_jax.wiring import backbone_for


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        policy: as `bicache evaluate` names them, or the name of a baseline.
        prefix: tokens of the shared prefix.
        suffix: tokens of the rest of the prompt and the response.
        rows: rows of the batch.
        prefixes: prefixes that they share.
        refresh_interval: N.
        boundary: b; `auto` takes the model's table.
        sampling: decoding settings.
    """

    policy: str
    prefix: int
    suffix: int
    rows: int
    prefixes: int
    refresh_interval: int
    boundary: int | str
    sampling: SamplingConfig

    @property
    def workload(self) -> tuple[Any, ...]:
        """What is asked, whatever the policy: cases with equal workloads are compared."""
        return self.prefix, self.suffix, self.rows, self.prefixes, self.sampling


@runtime_checkable
class Runner(Protocol):
    """Something that can run a case over and over."""

    def prepare(self) -> None:
        """Compiles whatever needs to be."""
        ...

    def run(self) -> float:
        """Runs the case; returns seconds."""
        ...

    def first_token(self) -> float:
        """Seconds until a first token is unmasked, the encoding of the prefixes included."""
        ...

    def facts(self) -> dict[str, Any]:
        """What is known of the case apart from its time."""
        ...


def synthetic_requests(config: ModelConfig, case: Case, seed: int = 0) -> list[Request]:
    """Random prompts of exactly the case's lengths, neighbours in one prefix.

    Raises:
        BicacheError: the lengths do not go together.
    """
    rest = case.suffix - case.sampling.gen_length
    least = config.shifted
    if rest < least:
        raise BicacheError(
            f"suffix {case.suffix} is too short for gen_length {case.sampling.gen_length}"
            + (" and a prompt token" if least else "")
        )
    if case.prefix + rest < 1:
        raise BicacheError("prefix 0 needs a suffix longer than gen_length: a prompt has at least one token")
    if case.prefix + case.suffix > config.max_length:
        raise BicacheError(
            f"prefix {case.prefix} and suffix {case.suffix} are more than the model's {config.max_length} positions"
        )
    rng = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(config.vocab_size), [config.mask_id, *config.eos_ids])
    shared = [rng.choice(allowed, case.prefix) for _ in range(case.prefixes)]
    requests = []
    for index in range(case.rows):
        prefix = shared[index * case.prefixes // case.rows]
        prompt = tuple(map(int, np.concatenate([prefix, rng.choice(allowed, rest)])))
        requests.append(Request(f"{index}", prompt, case.prefix, case.sampling, index=index))
    return requests


class EngineRunner:
    """Runs a case as any user's program would: through `Engine.generate`."""

    def __init__(self, model: Model, case: Case, attention: str = "auto") -> None:
        cache = CacheConfig(boundary=case.boundary, refresh_interval=case.refresh_interval)  # type: ignore[arg-type]
        self._model, self._attention, self._rows = model, attention, case.rows
        self._cache = cache_for(model, parse_policy(case.policy, cache))
        self._requests = synthetic_requests(model.config, case)
        self._compile_seconds = 0.0
        self._last = self._engine(self._cache)

    def _engine(self, cache: CacheConfig) -> Engine:
        return Engine(self._model, cache=cache, batch_size=self._rows, attention=self._attention)

    def prepare(self) -> None:
        """Compiles: a run up to the first token uses the programs of the whole one."""
        before = self._engine(self._cache)
        self.first_token()
        self._compile_seconds = before.stats.compile_seconds

    def run(self) -> float:
        """Runs all rows to their end."""
        self._last = self._engine(self._cache)
        started = time.perf_counter()
        self._last.generate(self._requests)
        return time.perf_counter() - started

    def first_token(self) -> float:
        """A dispatch of one step (their number is traced, so nothing compiles for it)."""
        return self._first_token(self._engine(self._cache))

    def _first_token(self, engine: Engine) -> float:
        started = time.perf_counter()
        next(engine.stream(self._requests, every=1))
        return time.perf_counter() - started

    def kept_first_token(self) -> float | None:
        """As `first_token`, of a second call that finds the prefixes encoded; None without a prefix cache."""
        if self._cache.policy == "none":
            return None
        engine = self._engine(self._cache)
        self._first_token(engine)  # it encodes
        return statistics.median(self._first_token(engine) for _ in range(3))

    def job(self) -> Job:
        """The run of a row; prefixes are shared by as many rows as they are on average."""
        plan = self._last.plan(self._requests)
        return dataclasses.replace(
            jobs(plan.rows, self._cache)[0],
            rows_per_prefix=self._rows / max(1, len({row.prefix for row in plan.rows})),
        )

    def facts(self) -> dict[str, Any]:
        """Work, memory, and what the engine counted."""
        plan, stats = self._last.plan(self._requests), self._last.stats
        batch = plan.batches[0]
        backbone = backbone_for(self._model.config, self._attention, make=self._model.backbone)
        memory = lower_decode(backbone, self._model.params, plan, batch).compile().memory_analysis()
        used = None
        if memory is not None:
            used = (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                + memory.temp_size_in_bytes
                - memory.alias_size_in_bytes
            )
        return {
            "boundary": batch.boundary if self._cache.policy != "none" else None,
            "flops": row_flops(self._model.config, self.job()) * self._rows,
            "memory_bytes": used,
            "cache_bytes": plan.cache_bytes(batch),
            "compile_s": round(self._compile_seconds, 3),
            "dispatches": stats.dispatches,
            "forward_passes": stats.forward_passes,
            "first_token_kept_s": _rounded(self.kept_first_token()),
        }


def matmul_peak(dtype: Any, size: int | None = None) -> Callable[[], float]:
    """A function that measures how many operations a second a large matrix product makes.

    A try is short; of many, spread over a whole run, some are left alone even on a shared machine, and the best counts.

    Args:
        dtype: of the factors; integers are summed in int32.
        size: of the square matrices; None: what fills the device.
    """
    from bicache_jax.core.numerics import precision

    on_cpu = jax.default_backend() == "cpu"
    size, turns = size or (2048 if on_cpu else 8192), 1 if on_cpu else 20
    integer = jnp.issubdtype(dtype, jnp.integer)
    ones, mean = jnp.ones((size, size), dtype), jnp.full((size, size), 1 if integer else 1 / size, dtype)

    def multiply(x: jax.Array, mean: jax.Array) -> jax.Array:
        sums = jnp.int32 if integer else None
        return jnp.matmul(mean, x, precision=precision(dtype), preferred_element_type=sums).astype(dtype)

    @jax.jit
    def product(x: jax.Array, mean: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: multiply(x, mean), x)

    def once() -> float:
        started = time.perf_counter()
        product(ones, mean).block_until_ready()
        return turns * 2 * size**3 / (time.perf_counter() - started)

    once()
    return once


def memory_bandwidth() -> float:
    """Bytes a second that the accelerator moves; infinite on CPU, where caches make one number meaningless."""
    if jax.default_backend() == "cpu":
        return math.inf
    x = jnp.ones((256 * 2**20,), jnp.bfloat16)
    turns = 20

    @jax.jit
    def sweep(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: x + 1, x)

    sweep(x).block_until_ready()
    started = time.perf_counter()
    sweep(x).block_until_ready()
    return turns * 2 * x.nbytes / (time.perf_counter() - started)


def device_name() -> str:
    """The device, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind} x {jax.device_count()}"
    return f"{_cores()} x {_cpu_name() or platform.machine()}"


def load_average() -> float | None:
    """Processes that wanted a core in the last minute, where the system says so: were measurements disturbed?"""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""


def measure(
    runners: Sequence[Runner],
    *,
    peak: Callable[[], float],
    repeats: int,
    seconds: float,
    progress: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Runs all cases in turns.

    Args:
        runners: the cases.
        peak: measures the matmul peak.
        repeats: most turns.
        seconds: no turn begins that would probably end later; the first always runs.
        progress: called after each run.

    Returns:
        Seconds [turns, cases], seconds to the first token [turns, cases], and the highest matmul peak seen.
    """
    for runner in runners:
        runner.prepare()
        progress()
    started = time.perf_counter()
    times: list[list[float]] = []
    firsts: list[list[float]] = []
    peaks = [peak() for _ in range(5)]
    while len(times) < repeats:
        row, first = [], []
        for runner in runners:
            first.append(runner.first_token())
            row.append(runner.run())
            peaks.append(peak())
            progress()
        times.append(row)
        firsts.append(first)
        passed = time.perf_counter() - started
        if passed + passed / len(times) > seconds:
            break
    return np.asarray(times), np.asarray(firsts), max(peaks)


def report(
    config: ModelConfig,
    cases: Sequence[Case],
    runners: Sequence[Runner],
    times: np.ndarray,
    firsts: np.ndarray,
    *,
    peak: float,
    bandwidth: float,
    itemsize: int,
) -> list[dict[str, Any]]:
    """One record for each case; JSON values only."""
    records = []
    references = {case.workload: place for place, case in enumerate(cases) if case.policy == "none"}
    for place, (case, runner) in enumerate(zip(cases, runners, strict=True)):
        tokens = case.rows * case.sampling.gen_length
        seconds = statistics.median(times[:, place])
        facts = runner.facts()
        ratios = None
        if case.workload in references:
            ratios = times[:, references[case.workload]] / times[:, place]
        ratio = None if ratios is None else float(np.median(ratios))
        limit = None
        if isinstance(runner, EngineRunner):
            limit = gain_limit(config, runner.job(), case.rows, peak=peak, bandwidth=bandwidth, itemsize=itemsize)
        records.append(
            {
                "policy": case.policy,
                "prefix": case.prefix,
                "suffix": case.suffix,
                "ratio": prefix_ratio(case.prefix, case.prefix + case.suffix),
                "rows": case.rows,
                "prefixes": case.prefixes,
                "refresh_interval": case.refresh_interval,
                "steps": case.sampling.num_steps,
                "gen_length": case.sampling.gen_length,
                "tokens_per_s": round(tokens / seconds, 3),
                "tokens_per_s_spread": [
                    round(tokens / float(t), 3) for t in (times[:, place].max(), times[:, place].min())
                ],
                "seconds": round(seconds, 4),
                "ratio_to_none": _rounded(ratio),
                "ratio_spread": None if ratios is None else [_rounded(ratios.min()), _rounded(ratios.max())],
                "limit": _rounded(limit),
                "limit_share": _rounded(ratio / limit) if ratio is not None and limit is not None else None,
                "mfu": _rounded(facts["flops"] / (seconds * peak)),
                "first_token_s": _rounded(statistics.median(firsts[:, place])),
                **facts,
            }
        )
    return records


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)
