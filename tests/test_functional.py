"""The functional layer for JAX programs: what it accepts, refuses, and gives on meshes, in maps and under gradients."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from bicache_jax import Model, PrefixCache, SamplingConfig, denoise, encode_prefix, forward, load_model
from bicache_jax.core import config
from bicache_jax.serving.compilation import CompileCounter

SAMPLING = SamplingConfig(gen_length=8, steps=4)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(golden.FOLDERS["llada"])


@pytest.fixture(scope="module")
def prefix(model: Model) -> PrefixCache:
    return encode_prefix(model.params, model.config, jnp.arange(10, 30), boundaries=[1, 3])


def answer(
    model: Model, prefix: PrefixCache, boundary: Any, key: Any = None, sampling: SamplingConfig = SAMPLING
) -> Any:
    canvas = jnp.broadcast_to(jnp.arange(40, 52), (2, 12))
    key = jax.random.key(0) if key is None else key
    return denoise(model.params, model.config, prefix, canvas, boundary, sampling, key)


def test_a_boundary_that_was_not_encoded_is_refused(model: Model, prefix: PrefixCache) -> None:
    with pytest.raises(ValueError, match=r"not encoded for boundary 2, only for 1, 3"):
        answer(model, prefix, 2)
    for beyond in (99, -1):
        with pytest.raises(ValueError, match=r"boundary must lie in 0\.\.6"):
            answer(model, prefix, beyond)


def test_shapes_that_do_not_fit_and_what_has_arrays_in_it(model: Model, prefix: PrefixCache) -> None:
    call = inspect.unwrap(denoise)  # without the checker of the tests
    with pytest.raises(ValueError, match=r"canvas must be \[B, U\], a row for each response, got shape \[12\]"):
        call(model.params, model.config, prefix, list(range(40, 52)), 1, SAMPLING, jax.random.key(0))
    with pytest.raises(ValueError, match=r"ids must be \[B, S\].* got shape \[3\]"):
        inspect.unwrap(forward)(model.params, model.config, jnp.arange(3))
    rows = call(model.params, model.config, prefix, [list(range(40, 52))] * 2, 1, SAMPLING, jax.random.key(0))
    np.testing.assert_array_equal(rows.tokens, answer(model, prefix, 1).tokens)
    for one in (rows, prefix):
        assert one == one and hash(one) is not None and one != jax.tree.map(lambda leaf: leaf, one)


@pytest.mark.slow
def test_a_block_cache_implies_a_block_length_here_too(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `generate`: what a call says and what it leaves open give one result."""
    monkeypatch.setattr(config, "CACHED_BLOCK", 4)
    cache, canvas = encode_prefix(model.params, model.config, jnp.arange(10, 30)), jnp.arange(40, 52)[None]

    def run(sampling: SamplingConfig) -> Any:
        key = jax.random.key(0)
        return denoise(model.params, model.config, cache, canvas, 1, sampling, key, block_cache="dual").tokens

    with pytest.raises(ValueError, match="10 and 4"):
        run(SamplingConfig(gen_length=10))
    found = [run(SamplingConfig(gen_length=8, block_length=block)) for block in (None, 4, 8)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


@pytest.mark.slow
def test_a_prefix_that_a_traced_function_closes_over(model: Model, prefix: PrefixCache) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    canvas = jnp.broadcast_to(jnp.arange(40, 52), (2, 12))
    wanted = answer(model, prefix, 3).tokens

    def run(canvas: jax.Array, boundary: int = 3) -> jax.Array:
        return denoise(model.params, model.config, prefix, canvas, boundary, SAMPLING, jax.random.key(0)).tokens

    np.testing.assert_array_equal(jax.jit(run)(canvas), wanted)
    np.testing.assert_array_equal(jax.jit(jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows))(canvas), wanted)
    with pytest.raises(ValueError, match="not encoded for boundary 2"):
        jax.jit(functools.partial(run, boundary=2))(canvas)


def test_a_traced_boundary_that_was_not_encoded_gives_no_tokens(model: Model, prefix: PrefixCache) -> None:
    run = jax.jit(lambda prefix, boundary: answer(model, prefix, boundary))
    right = run(prefix, 3)
    np.testing.assert_array_equal(right.tokens, answer(model, prefix, 3).tokens)
    assert not right.failed.any()
    for boundary in (2, 99):
        wrong = run(prefix, boundary)
        assert wrong.failed.all() and (wrong.tokens == model.config.mask_id).all() and not wrong.steps.any()
    checked = checkify.checkify(run)
    assert checked(prefix, 3)[0].get() is None
    assert "the prefixes were not encoded for boundary 2" in str(checked(prefix, 2)[0].get())


def test_without_a_prefix_any_boundary_will_do(model: Model) -> None:
    empty = encode_prefix(model.params, model.config, jnp.zeros((0,), jnp.int32), boundaries=[1])
    np.testing.assert_array_equal(answer(model, empty, 1).tokens, answer(model, empty, 4).tokens)


def test_older_keys_work(model: Model, prefix: PrefixCache) -> None:
    drawn = SamplingConfig(gen_length=8, steps=4, temperature=1.0)
    new = answer(model, prefix, 3, jax.random.key(7), drawn)
    old = answer(model, prefix, 3, jax.random.PRNGKey(7), drawn)
    np.testing.assert_array_equal(new.tokens, old.tokens)
    each = answer(model, prefix, 3, jax.random.split(jax.random.PRNGKey(7), 2), drawn)
    keys = jax.random.split(jax.random.key(7), 2)
    np.testing.assert_array_equal(each.tokens, answer(model, prefix, 3, keys, drawn).tokens)
    assert not np.array_equal(new.tokens, answer(model, prefix, 3, jax.random.PRNGKey(8), drawn).tokens)


def test_calls_outside_of_jit_compile_once(model: Model) -> None:
    def run(shift: int) -> None:
        prefix = encode_prefix(model.params, model.config, jnp.arange(10, 30) + shift, boundaries=[1])
        answer(model, prefix, 1).tokens.block_until_ready()

    run(0)
    counter = CompileCounter()
    run(1)
    assert counter.count == 0


def test_gradients(model: Model, prefix: PrefixCache) -> None:
    """`forward` has one, and the loops say that they have none."""
    ids = jnp.arange(10, 20)[None]

    def loss(params: Any) -> jax.Array:
        return jnp.mean(forward(params, model.config, ids) ** 2)

    slope = jax.grad(loss)(model.params)["norm"]["scale"]
    step = 1e-2 * slope / jnp.linalg.norm(slope)
    moved = [model.params | {"norm": {"scale": model.params["norm"]["scale"] + sign * step}} for sign in (1, -1)]
    assert float(loss(moved[0]) - loss(moved[1])) == pytest.approx(2e-2 * float(jnp.linalg.norm(slope)), rel=0.05)
    with pytest.raises(TypeError, match="encode_prefix has no gradient"):
        jax.grad(lambda params: encode_prefix(params, model.config, ids, boundaries=[1]).k.sum())(model.params)
    with pytest.raises(TypeError, match="denoise has no gradient"):
        denoised = functools.partial(denoise, config=model.config, prefix=prefix, canvas=ids, boundary=1)
        run = functools.partial(denoised, sampling=SAMPLING, key=jax.random.key(0))
        jax.grad(lambda params: run(params).tokens.sum().astype(float))(model.params)


@pytest.mark.full
@pytest.mark.parametrize("family", ["dream", pytest.param("llada", marks=pytest.mark.full)])
def test_meshes_shards_and_maps_give_the_same_tokens(family: str) -> None:
    child = Path(__file__).with_name("functional_child.py")
    environment = os.environ | {"PYTHONPATH": f"{child.parents[1]}{os.pathsep}{child.parent}"}
    done = subprocess.run([sys.executable, str(child), family], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("distinct") > 4
    assert len(found) == 11 and all(found.values()), found
