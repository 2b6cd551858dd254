"""How much of a batch is idle on mixed work, where rows join and where a batch waits for its slowest row."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bicache_jax.core.config import CacheConfig, ModelConfig, SamplingConfig
from bicache_jax.core.types import BicacheError, Model, Request, Result
from bicache_jax.measure.policies import parse_policy
from bicache_jax.serving.engine import Engine
from bicache_jax.serving.stats import Stats

LENGTHS = (32, 64, 96, 128, 192, 256)
"""Response tokens of mixed work."""
REST = 24
"""Prompt tokens behind the prefix, at most."""
BLOCK = 32
ENDS = 100
"""One token in so many ends a response of a model with random weights, which knows no end of text."""


def ending(model: Model) -> Model:
    """A model with random weights whose responses end early: in a block of 32 tokens with a chance of about 1/4."""
    ends = tuple(token for token in range(ENDS - 1, model.config.vocab_size, ENDS) if token != model.config.mask_id)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=ends))


def mixed_requests(
    config: ModelConfig, *, count: int, prefix: int, prefixes: int, threshold: float | None, seed: int = 0
) -> list[Request]:
    """Random prompts over shared prefixes that ask for responses of many lengths, stop early and decide by confidence.

    Args:
        config: the architecture.
        count: requests.
        prefix: tokens of a shared prefix.
        prefixes: how many of them there are.
        threshold: probability from which tokens are unmasked at once; None: a token a step.
        seed: of the prompts.

    Raises:
        BicacheError: the longest of them does not fit into the model.
    """
    if prefix + REST + max(LENGTHS) > config.max_length:
        raise BicacheError(
            f"prefix {prefix}: with {REST} + {max(LENGTHS)} tokens behind it, it is longer than the model's "
            f"{config.max_length} positions"
        )
    rng = np.random.default_rng(seed)
    allowed = np.setdiff1d(np.arange(config.vocab_size), [config.mask_id, *config.eos_ids])
    shared = [rng.choice(allowed, prefix) for _ in range(prefixes)]
    found = []
    for index in range(count):
        length = int(rng.choice(LENGTHS))
        sampling = SamplingConfig(
            length, length, BLOCK, threshold=threshold, early_stop=True, temperature=0.5, seed=index
        )
        rest = rng.choice(allowed, rng.integers(REST // 3, REST + 1))
        prompt = tuple(map(int, np.concatenate([shared[index % prefixes], rest])))
        found.append(Request(f"{index}", prompt, prefix, sampling, index=index))
    return found


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the work.

    Attributes:
        seconds: time that it took.
        stats: what the engine counted.
        results: in the order of the requests.
    """

    seconds: float
    stats: Stats
    results: list[Result]

    @property
    def own(self) -> float:
        """Share of the row-steps that the device ran that were some request's own."""
        return self.stats.forward_passes / self.stats.row_steps


def _joining(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    return engine.generate(requests)


def _waiting(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """Each planned batch to its end before the next one begins."""
    found: dict[str, Result] = {}
    for batch in engine.plan(requests).batches:
        found |= {result.id: result for result in engine.generate([row.request for row in batch.rows])}
    return [found[request.id] for request in requests]


def measure_mixed(
    model: Model,
    policies: Sequence[str],
    requests: Sequence[Request],
    *,
    rows: int,
    repeats: int,
    seconds: float,
    refresh_interval: Any = "auto",
    boundary: Any = "auto",
    attention: str = "auto",
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Runs mixed work under each policy, with and without joining, in turns in one process.

    Args:
        model: the model.
        policies: by name.
        requests: the work (`mixed_requests`).
        rows: most rows of a batch.
        repeats: most turns.
        seconds: no turn begins that would probably end later; the first always runs.
        refresh_interval: N.
        boundary: b; `auto` takes the model's table.
        attention: implementation of prefix attention.
        progress: called after each run.

    Returns:
        A record for each policy; JSON values only.

    Raises:
        BicacheError: a policy is unknown.
    """
    ways = {"joining": _joining, "waiting": _waiting}
    shared = CacheConfig(refresh_interval=refresh_interval, boundary=boundary)
    caches = [parse_policy(policy, shared) for policy in policies]
    keys = [(place, way) for place in range(len(policies)) for way in ways]
    runs: dict[tuple[int, str], list[Run]] = {key: [] for key in keys}

    def once(place: int, way: str) -> Run:
        engine = Engine(model, cache=caches[place], batch_size=rows, attention=attention)
        began = time.perf_counter()
        results = ways[way](engine, requests)
        return Run(time.perf_counter() - began, engine.stats, results)

    for key in keys:
        once(*key)  # compiles
        progress()
    began = time.perf_counter()
    while len(runs[keys[-1]]) < repeats:
        for key in keys:
            runs[key].append(once(*key))
            progress()
        passed = time.perf_counter() - began
        if passed + passed / len(runs[keys[-1]]) > seconds:
            break
    records = []
    for place, policy in enumerate(policies):
        joining, waiting = (runs[place, way] for way in ways)
        tokens = [[result.token_ids for result in run.results] for run in (joining[0], waiting[0])]
        ratios = [after.seconds / before.seconds for before, after in zip(joining, waiting, strict=True)]
        passes = sorted(result.forward_passes for result in joining[0].results)
        records.append(
            {
                "policy": policy,
                "requests": len(requests),
                "rows": rows,
                "prefixes": len({request.prompt_ids[: request.prefix_len] for request in requests}),
                "passes": [passes[0], round(statistics.mean(passes), 1), passes[-1]],
                "own": round(joining[0].own, 4),
                "own_waiting": round(waiting[0].own, 4),
                "differ": sum(one != other for one, other in zip(*tokens, strict=True)),
                "responses_per_s": round(len(requests) / statistics.median(run.seconds for run in joining), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
                "turns": len(ratios),
            }
        )
    return records
