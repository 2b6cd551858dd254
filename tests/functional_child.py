"""A program for tests: the functional layer on meshes of eight virtual CPU devices. Prints findings as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import golden
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bicache_jax import SamplingConfig, denoise, encode_prefix, forward, load_model
from bicache_jax.models import AXES
from bicache_jax.sharding import param_specs

BOUNDARY, ROWS = 2, 8
SAMPLING = SamplingConfig(gen_length=16, steps=8, block_length=8, temperature=0.5)


def main(family: str) -> None:
    """Compares meshes with one device, for the family `llada` or `dream`."""
    model = load_model(golden.FOLDERS[family])
    params, config = model.params, model.config
    rng = np.random.default_rng(0)
    prefix_ids = jnp.asarray(rng.integers(6, 290, (ROWS, 20)), jnp.int32)
    canvas = jnp.asarray(rng.integers(6, 290, (ROWS, 24)), jnp.int32)
    keys = jax.random.split(jax.random.key(3), ROWS)

    def answer(
        params: dict, prefix_ids: jax.Array, canvas: jax.Array, keys: jax.Array, sampling: SamplingConfig = SAMPLING
    ) -> jax.Array:
        prefix = encode_prefix(params, config, prefix_ids, boundaries=[BOUNDARY])
        return denoise(params, config, prefix, canvas, BOUNDARY, sampling, keys, refresh_interval=3).tokens

    wanted = np.asarray(answer(params, prefix_ids, canvas, keys))
    logits = np.asarray(forward(params, config, canvas))
    found: dict[str, object] = {"distinct": len({tuple(row) for row in wanted.tolist()})}

    def check(name: str, tokens: jax.Array, spec: P | None = None) -> None:
        found[name] = bool(np.array_equal(np.asarray(tokens), wanted))
        if spec is not None:
            found[f"{name}, spec"] = jax.typeof(tokens).sharding.spec == spec

    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
        put = lambda x, spec, mesh=mesh: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        cut = jax.tree.map(put, params, param_specs(AXES, params))
        args = (cut, put(prefix_ids, P("data")), put(canvas, P("data")), put(keys, P("data")))
        spec = P("data", None) if kind == AxisType.Explicit else None
        check(f"{kind.name}, jit", jax.jit(answer)(*args), spec)
        if kind == AxisType.Explicit:
            check("eager", answer(*args), spec)
            with jax.set_mesh(mesh):
                check("set_mesh", jax.jit(answer)(*args), spec)
            whole = jax.jit(forward, static_argnums=1)(cut, config, args[2])
            found["forward"] = bool(np.allclose(np.asarray(whole), logits, atol=2e-4))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shards = jax.shard_map(answer, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P("data"))
    check("shard_map", jax.jit(shards)(params, prefix_ids, canvas, keys))
    guided = dataclasses.replace(SAMPLING, cfg_scale=0.5, top_p=0.9, remasking="random")
    run = functools.partial(answer, sampling=guided)
    alone = np.asarray(run(params, prefix_ids[:2], canvas[:2], keys[:2]))
    pairs = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(), P(), P()), out_specs=P("data"))
    again = np.asarray(jax.jit(pairs)(params, prefix_ids[:2], canvas[:2], keys[:2]))
    found["shard_map, guided"] = bool(np.array_equal(again, np.tile(alone, (8, 1))))
    both = jax.vmap(answer, in_axes=(None, 0, 0, 0))
    halves = [array.reshape(2, 4, *array.shape[1:]) for array in (prefix_ids, canvas, keys)]
    check("vmap", both(params, *halves).reshape(wanted.shape))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
