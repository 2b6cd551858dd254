"""Many requests over many prefixes through one engine that can keep few of them: same answers, memory flat.

    python scripts/soak.py --output scripts/results/soak.json

Requests are asked of an `AsyncEngine` by many tasks, in random order. The answers are compared with those of one plain
`Engine.generate` call that keeps nothing. Memory is looked at all along the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bicache_jax import AsyncEngine, CacheConfig, Engine, Model, Request, SamplingConfig, load_model
from bicache_jax.measure.benchmark import device_name
from bicache_jax.serving.compilation import CompileCounter
from bicache_jax.serving.memory import Buffers, prefix_bytes


def requests(model: Model, count: int, prefixes: int, seed: int = 0) -> list[Request]:
    """Requests of one bucket; popular prefixes are asked for more often, as in life (Zipf)."""
    rng, config = np.random.default_rng(seed), model.config
    allowed = np.setdiff1d(np.arange(config.vocab_size), [config.mask_id, *config.eos_ids])
    shared = [tuple(map(int, rng.choice(allowed, rng.integers(33, 65)))) for _ in range(prefixes)]
    weights = 1 / np.arange(1, prefixes + 1)
    found = []
    for index, number in enumerate(rng.choice(prefixes, count, p=weights / weights.sum())):
        rest = tuple(map(int, rng.choice(allowed, rng.integers(1, 9))))
        sampling = SamplingConfig(8, 8, 4, early_stop=True, temperature=0.5, seed=index)
        found.append(Request(f"{index}", shared[number] + rest, len(shared[number]), sampling, index=index))
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def on_device() -> int:
    """Bytes of all arrays on devices."""
    return sum(array.nbytes for array in jax.live_arrays())


async def ask(engine: Engine, work: list[Request], at_once: int, looks: int) -> tuple[dict[str, Any], list[Any]]:
    """Asks everything, so many at once; answers by id, and memory along the way."""
    found: dict[str, Any] = {}
    seen: list[tuple[int, int, int]] = []
    gate = asyncio.Semaphore(at_once)
    every = max(1, len(work) // looks)

    async with AsyncEngine(engine, max_queue=at_once, frame_seconds=0.02) as one:

        async def single(request: Request) -> None:
            async with gate:
                found[request.id] = (await one.generate(request))[0]
            if len(found) % every == 0:
                seen.append((len(found), resident(), on_device()))

        await asyncio.gather(*map(single, work))
    return found, seen


def main() -> None:
    """Runs the soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="example", metavar="M", help="(default: %(default)s)")
    parser.add_argument("--requests", type=int, default=20_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--prefixes", type=int, default=500, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--kept", type=int, default=50, metavar="N", help="that fit into the budget (default: 50)")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="of a batch, at most (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="also write the figures here")
    args = parser.parse_args()
    model = load_model(args.model)
    config, cache = model.config, CacheConfig(boundary=2, refresh_interval=4)
    work = requests(model, args.requests, args.prefixes)
    layers = Buffers.between(2, 2, config.num_layers).shallow
    one = prefix_bytes(config, model.dtype.itemsize, length=64, layers=layers)
    engine = Engine(model, cache=cache, batch_size=args.rows, prefix_cache_bytes=args.kept * one)
    for size in range(1, args.rows + 1):  # every size that a lane may have
        asyncio.run(ask(engine, work[:size], size, 1))
    asyncio.run(ask(engine, work[: 16 * args.rows], 4 * args.rows, 1))
    before, compiled, began = engine.prefixes.stats, CompileCounter(), time.perf_counter()
    found, seen = asyncio.run(ask(engine, work, 4 * args.rows, 100))
    seconds, stats, compilations = time.perf_counter() - began, engine.prefixes.stats, compiled.count
    plain = Engine(model, cache=cache, batch_size=args.rows, prefix_cache_bytes=0).generate(work)
    halves = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    record = {
        "model": args.model,
        "device": device_name(),
        "jax": jax.__version__,
        "requests": len(work),
        "prefixes": len({request.prompt_ids[: request.prefix_len] for request in work}),
        "kept": args.kept,
        "seconds": round(seconds, 1),
        "differ": sum(found[result.id] != result for result in plain),
        "compilations": compilations,
        "hits": stats.hits - before.hits,
        "misses": stats.misses - before.misses,
        "evictions": stats.evictions - before.evictions,
        "most_kept_bytes": stats.nbytes,
        "budget_bytes": stats.budget,
        "resident_mib": [round(statistics.median(r for _, r, _ in part) / 2**20) for part in halves],
        "device_mib": [round(statistics.median(d for *_, d in part) / 2**20, 1) for part in halves],
    }
    text = json.dumps(record, indent=1)
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
