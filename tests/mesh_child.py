"""Loads golden checkpoints onto meshes of 8 virtual devices: `python tests/mesh_child.py FOLDER-FOR-ORBAX`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import checkpoint_files  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from golden import FOLDERS  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from bicache_jax import BicacheError, CacheConfig, Engine, SamplingConfig, load_model  # noqa: E402
from bicache_jax.convert import convert  # noqa: E402
from bicache_jax.models import AXES  # noqa: E402
from bicache_jax.sharding import MODEL, Partition, make_mesh, shard_params  # noqa: E402

REQUESTS = [{"prompt_ids": [*range(10, 30), 40 + i]} for i in range(4)]


def same(a: jax.Array, b: jax.Array) -> None:
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
    np.testing.assert_array_equal(a, b)


damaged = checkpoint_files.llada(Path(sys.argv[1]) / "damaged")
tensors = load_file(damaged / "model.safetensors")
BAD = ("model.transformer.blocks.1.ff_out.weight", "model.transformer.blocks.2.q_proj.weight")
for name in BAD:
    tensors[name].flat[-1] = np.nan
save_file(tensors, damaged / "model.safetensors")
try:
    load_model(damaged, mesh=make_mesh("data=2,model=4"), check_weights=True)
except BicacheError as error:
    assert all(name in str(error) for name in BAD) and str(error).count("model.transformer") == len(BAD), error
else:
    raise AssertionError("a damaged model was loaded")

for family, folder in FOLDERS.items():
    orbax = Path(sys.argv[1]) / family
    convert(folder, orbax)
    whole = load_model(folder)
    for spec in ("data=2,model=4", "model=8", "model=3"):
        mesh = make_mesh(spec)
        expected = shard_params(whole.params, AXES, Partition(whole.config, mesh.shape[MODEL]), mesh)
        for source in (folder, orbax):
            jax.tree.map(same, load_model(source, mesh=mesh, check_weights=spec == "model=3").params, expected)
        print(family, spec, flush=True)
    eight = Path(sys.argv[1]) / f"{family}-w8"
    convert(folder, eight, to="safetensors", quantize="w8")
    mesh, whole_w8 = make_mesh("data=2,model=4"), load_model(folder, quantize="w8")
    expected = shard_params(whole_w8.params, AXES, Partition(whole_w8.config, 4), mesh)
    jax.tree.map(same, load_model(eight, mesh=mesh).params, expected)
    if family == "llada":
        continue
    mesh = make_mesh("model=4")
    settings = {"cache": CacheConfig(boundary=2), "sampling": SamplingConfig(gen_length=4, steps=2)}
    answers = [result.token_ids for result in Engine(whole, **settings).generate(REQUESTS)]
    on_mesh = Engine(load_model(orbax, mesh=mesh), mesh=mesh, **settings)
    assert [result.token_ids for result in on_mesh.generate(REQUESTS)] == answers
    texts = [{**request, "choices_ids": [[50, 51, 52], [60]]} for request in REQUESTS]
    scores = [score.choices for score in Engine(whole, **settings).score(texts, samples=16)]
    mesh = make_mesh("data=2,model=4")
    shared = Engine(load_model(orbax, mesh=mesh), mesh=mesh, **settings).score(texts, samples=16)
    for one, other in zip([score.choices for score in shared], scores, strict=True):
        np.testing.assert_allclose(*([choice.log_likelihood for choice in each] for each in (one, other)), rtol=1e-5)
