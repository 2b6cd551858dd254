"""A program for tests: one family's requests on meshes of eight virtual CPU devices. Prints findings as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import golden
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bicache_jax import CacheConfig, Engine, Model, ModelConfig, Request, SamplingConfig, load_model
from bicache_jax.measure.hlo import collectives, crossing
from bicache_jax.models import init
from bicache_jax.serving.programs import EncodeCall, lower_decode
from bicache_jax.serving.run_prefixes import RunPrefixes
from bicache_jax.serving.scheduler import scheduled
from bicache_jax.serving.store import PrefixStore
from bicache_jax.sharding import make_mesh

MESHES = ("data=8,model=1", "data=4,model=2", "data=2,model=4", "data=1,model=8")
POLICIES: dict[str, dict[str, Any]] = {
    "bicache": {"boundary": 2},
    "naive": {"policy": "naive"},
    "none": {"policy": "none"},
    "bicache+dual": {"boundary": 2, "block_cache": "dual"},
    "bicache+prefix": {"boundary": 2, "block_cache": "prefix"},
}
DECODERS: dict[str, dict[str, Any]] = {
    "": {},
    "filtered": {"top_p": 0.8, "top_k": 30, "alg_temperature": 0.1, "remasking": "topk_margin"},
    "guided": {"cfg_scale": 1.5},
    "early": {"threshold": 0.2, "early_stop": True},
}
"""Settings that read more of the vocabulary than its best token; behind a policy's name as in `bicache/guided`."""
ODD = ModelConfig(
    "llada", 61, 24, 3, 6, 3, 4, 22, 1e4, 1e-5, 512, 5, qkv_bias=True, bias=True, norm_bias=True, head_bias=True
)
"""Sizes that no mesh divides, and every bias there can be."""
SOME = {
    "llada": {
        "bicache": MESHES[1:2],
        "bicache+dual": MESHES[2:3],
        "bicache/guided": MESHES[2:3],
    },
    "dream": {
        "bicache": MESHES[2:3],
        "none": MESHES[1:2],
        "bicache/early": MESHES[:1],
    },
    "odd": {"bicache": MESHES[2:3]},
}


def requests(vocab: int, decoder: str = "") -> list[Request]:
    """Greedy and sampled requests over three prefixes; one has more rows than a data shard's share."""
    rng = np.random.default_rng(11)
    prefixes = [tuple(map(int, rng.integers(6, vocab, size))) for size in (34, 40, 61)]
    found = []
    for index in range(17):
        prefix = prefixes[0 if index < 9 else 1 + index % 2]
        rest = tuple(map(int, rng.integers(6, vocab, rng.integers(1, 14))))
        sampling = SamplingConfig(16, 8, 8, temperature=0.7 * (index % 2), seed=index, **DECODERS[decoder])
        found.append(Request(f"r{index}", prefix + rest, len(prefix), sampling, index=index))
    return found


def engine(model: Model, policy: str, mesh: str | None) -> Engine:
    """An engine of small batches, so that few shapes are compiled."""
    cache = CacheConfig(refresh_interval=3, **POLICIES[policy])
    return Engine(model, cache=cache, batch_size=2, mesh=mesh and make_mesh(mesh))  # type: ignore[arg-type]


def tokens(engine: Engine, work: list[Request]) -> dict[str, tuple[int, ...]]:
    """Answers by request."""
    return {result.id: result.token_ids for result in engine.generate(work)}


def differing(model: Model, name: str, meshes: tuple[str, ...]) -> dict[str, list[str]]:
    """Requests that a mesh answers otherwise than one device."""
    policy, _, decoder = name.partition("/")
    if decoder == "early":  # rows stop, join and leave at their own times
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=tuple(range(3, 290, 7))))
    work = requests(min(model.config.vocab_size, 290), decoder)
    wanted = tokens(engine(model, policy, None), work)
    assert len(set(wanted.values())) > len(wanted) // 2
    found = {}
    for mesh in meshes:
        sharded = engine(model, policy, mesh)
        got = tokens(sharded, work)
        again = tokens(sharded, work)  # over the prefixes that the first call left
        found[mesh] = [one for one in wanted if not got[one] == again[one] == wanted[one]]
        print(name, mesh, f"{len(found[mesh])} of {len(wanted)} differ", file=sys.stderr, flush=True)
    return found


def inspect(model: Model, work: list[Request]) -> dict[str, Any]:
    """What lies where on a mesh of 4 data shards, and what its decode program says to whom."""
    sharded, alone = engine(model, "bicache", MESHES[1]), engine(model, "bicache", None)
    plan, single = sharded.plan(work), alone.plan(work)
    batches = plan.rounds[0]
    lane = scheduled(sharded._executor, plan, RunPrefixes(plan, PrefixStore(0)))._next()
    assert lane is not None
    lane.join()
    cache = lane._cache
    assert cache.k.sharding.spec == P(None, "data", "model")
    everyone = {prefix for batch in batches for prefix in batch.prefixes if prefix}
    length = plan.shape(*batches)[1]
    keys = {}
    for prefix in everyone:
        keys[prefix] = np.asarray(alone._executor.encode(EncodeCall(single, (prefix,), [[2]], length)).k)
    own = strangers = 0
    for part in cache.k.addressable_shards:
        shard, place = divmod(part.device.id, 2)
        held = np.asarray(part.data)
        for prefix, k in keys.items():
            here = k[:, 0, place * held.shape[2] : (place + 1) * held.shape[2], : len(prefix)]
            layers = min(len(held), len(here), 3)  # layers 0..b, what b = 2 reads
            same = [
                np.allclose(held[:layers, group, :, : len(prefix)], here[:layers], atol=1e-4)
                for group in range(held.shape[1])
            ]
            own += any(same) and prefix in batches[shard].prefixes
            strangers += any(same) and prefix not in batches[shard].prefixes
    executor = sharded._executor
    lowered = lower_decode(executor.backbone, executor.params, plan, *batches, mesh=executor.placement.mesh)
    talk = collectives(lowered.compile().as_text())
    mesh = sharded._executor.placement.mesh
    assert mesh is not None
    over_data = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P())
    crossed = collectives(jax.jit(over_data).lower(jnp.zeros(4)).compile().as_text())
    return {
        "own": own,
        "expected": 2 * sum(bool(prefix) for batch in batches for prefix in set(batch.prefixes)),
        "strangers": strangers,
        "collectives": len(talk),
        "crossing": len(crossing(talk, (4, 2))),
        "control": len(crossing(crossed, (4, 2))),
    }


def main(family: str, extent: str) -> None:
    """Runs the family `llada`, `dream` or `odd`, on some combinations of policy and mesh or on all."""
    every = (*POLICIES, "bicache/filtered", "bicache/guided", "bicache/early")
    runs: dict[str, tuple[str, ...]] = SOME[family] if extent == "some" else dict.fromkeys(every, MESHES)
    if family == "odd":
        model = Model(ODD, init(ODD, jax.random.key(3)))
        model.params["layers"]["o"]["bias"] += 0.1  # biases start at zero, and would hide being added twice
        model.params["layers"]["down"]["bias"] -= 0.2
        model.params["layers"]["q"]["bias"] += 0.3
        model.params["head_bias"] += jnp.arange(61) * 0.01
    else:
        model = load_model(golden.FOLDERS[family])
    found: dict[str, Any] = {"differing": {name: differing(model, name, meshes) for name, meshes in runs.items()}}
    if family == "dream":
        found["inspect"] = inspect(model, requests(290))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
