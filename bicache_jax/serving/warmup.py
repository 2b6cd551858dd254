"""Warming up: every program that a run needs is called once, and makes no step."""

from __future__ import annotations

import dataclasses

from bicache_jax.serving.compilation import CompileCounter
from bicache_jax.serving.executor import Executor
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.run_prefixes import RunPrefixes
from bicache_jax.serving.scheduler import scheduled
from bicache_jax.serving.stats import Counters
from bicache_jax.serving.store import PrefixStore


@dataclasses.dataclass(frozen=True)
class Warmup:
    """What warming up did.

    Attributes:
        shapes: shapes of the batches whose programs are ready now: prefixes G, prefix tokens P, rows B, suffix tokens
            U, in buckets.
        compilations: programs compiled, or fetched from the compilation cache.
        seconds: time spent on that.
    """

    shapes: tuple[tuple[int, int, int, int], ...]
    compilations: int
    seconds: float


def warm_up(executor: Executor, plan: Plan, store: PrefixStore) -> Warmup:
    """Compiles what a plan needs.

    Each program of a run is called as the run calls it, prefixes are encoded, and the decoding loop ends before its
    first step; so a run of the plan finds all of them.

    Args:
        executor: what runs the plan; its counts do not change.
        plan: the plan.
        store: where its prefixes are kept.
    """
    executor = dataclasses.replace(executor, counters=Counters())
    compiled, prefixes = CompileCounter(), RunPrefixes(plan, store)
    shapes = scheduled(executor, plan, prefixes).compile()
    prefixes.close()
    return Warmup(tuple(dict.fromkeys(shapes)), compiled.count, compiled.seconds)
