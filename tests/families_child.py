"""A program for tests: golden cases of the newer families on 2 x 2 virtual devices. Prints what it checked."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import families

from bicache_jax import CacheConfig, Engine, load_model
from bicache_jax.sharding import Partition, make_mesh, partition

CASES = {
    "sdar": ("static_P0_g24_b4_s4",),
    "llada2": ("dynamic_P0_g32_b8_s8_t0.5",),
    "llada-moe": ("llada_batch3_unequal_masked",),
}

mesh = make_mesh("data=2,model=2")
for name, wanted in CASES.items():
    if name == "llada-moe":  # where memory has no tiles, experts are cut by their width
        partition.LANES = partition.SUBLANES = 1
    folder, mask = families.FOLDERS[name], families.recorded(name)["mask_token_id"]
    model = load_model(folder, mask_id=mask, mesh=mesh)  # each device reads its part
    experts = Partition(model.config, 2).local.experts
    assert experts is None or experts.cut == ("width" if name == "llada-moe" else "expert")
    cache = CacheConfig() if model.config.block_causal else CacheConfig(policy="none")
    work = [case for case in families.cases(name) if case.name in wanted]
    found = Engine(model, cache=cache, mesh=mesh).generate([case.request for case in work])
    for case, result in zip(work, found, strict=True):
        assert case.agrees(result.token_ids), (name, case.request.id)
        print(name, case.request.id, flush=True)
