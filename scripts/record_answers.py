"""Records answers of the bundled model that no rounding changes, for `bicache doctor`.

    python scripts/record_answers.py

Kept are requests whose tokens stay the same, under every policy, when all weights are changed by random parts of 1e-5
of themselves, several times over: a device whose float32 is float32 must then give the same tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax import Model, load_model
from bicache_jax.example.task import FIRST_HELD_OUT, draw_requests
from bicache_jax.measure.doctor import answer

POLICIES = ("none", "bicache", "none+dual", "bicache+dual")
SAMPLING = {"gen_length": 8, "steps": 8, "block_length": 4}
CHANGE = 1e-5
SEED = FIRST_HELD_OUT + 17


def changed(model: Model, seed: int) -> Model:
    """The model with every weight w multiplied by 1 + 1e-5 z, z normal."""
    leaves, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy: list[Any] = [
        leaf * (1 + CHANGE * jax.random.normal(key, leaf.shape)) for leaf, key in zip(leaves, keys, strict=True)
    ]
    return dataclasses.replace(model, params=jax.tree.unflatten(tree, [jnp.asarray(x, jnp.float32) for x in noisy]))


def main(argv: Sequence[str] | None = None) -> None:
    """Records."""
    parser = argparse.ArgumentParser(description="Record answers of the bundled model.")
    parser.add_argument("--requests", type=int, default=24, help="requests to try (default: %(default)s)")
    parser.add_argument("--keep", type=int, default=12, help="requests to record (default: %(default)s)")
    parser.add_argument("--changes", type=int, default=4, help="changed models (default: %(default)s)")
    parser.add_argument("--output", default="bicache_jax/data/example/answers.json", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    model = load_model("example", dtype="float32")
    requests = [{key: drawn[key] for key in ("prompt", "prefix_len")} for drawn in draw_requests(SEED, args.requests)]
    found = {policy: answer(model, requests, policy, SAMPLING) for policy in POLICIES}
    steady = set(range(len(requests)))
    for seed in range(args.changes):
        other = changed(model, seed)
        for policy in POLICIES:
            again = answer(other, requests, policy, SAMPLING)
            steady -= {index for index in steady if again[index] != found[policy][index]}
    kept = sorted(steady)[: args.keep]
    record = {
        "requests": [requests[index] for index in kept],
        "sampling": SAMPLING,
        "answers": {policy: [found[policy][index] for index in kept] for policy in POLICIES},
    }
    Path(args.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(steady)} of {len(requests)} requests are steady, {len(kept)} recorded in {args.output}")


if __name__ == "__main__":
    main()
