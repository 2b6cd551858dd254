"""Weights in 8 bits: how they are rounded, multiplied, loaded and kept, and that no request depends on another."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import families
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import BicacheError, CacheConfig, Engine, Model, SamplingConfig, forward, load_model
from bicache_jax.checkpoints.tree import paths
from bicache_jax.convert import convert
from bicache_jax.core.quantized import MOST, in_8_bits, product, quantise
from bicache_jax.models import abstract, init
from bicache_jax.models.mixture import mix
from bicache_jax.serving.memory import params_bytes

RNG = np.random.default_rng(0)


def test_weights_are_rounded_to_the_nearest_of_their_channel() -> None:
    weight = RNG.normal(size=(5, 24, 7)).astype(np.float32) * RNG.uniform(0.01, 9, size=(5, 1, 7)).astype(np.float32)
    weight[2, :, 3] = 0
    for axis in (1, 2):
        whole, scale = quantise(jnp.asarray(weight), axis)
        assert whole.dtype == jnp.int8 and scale.shape == tuple(np.delete(weight.shape, axis))
        back = np.asarray(whole, np.float32) * np.expand_dims(scale, axis)
        assert (np.abs(back - weight) <= np.expand_dims(scale, axis) * 0.5001).all()
        peak = np.abs(np.asarray(whole, int)).max(axis)
        assert ((peak == MOST) | (np.abs(weight).max(axis) == 0)).all()


@pytest.mark.parametrize("out_first", [False, True])
def test_products(out_first: bool) -> None:
    x, weight = RNG.normal(size=(3, 6, 40)).astype(np.float32), RNG.normal(size=(40, 10)).astype(np.float32)
    whole, scale = quantise(jnp.asarray(weight.T if out_first else weight), int(out_first))
    back = np.asarray(whole, np.float64) * np.asarray(scale, np.float64)[(slice(None), None) if out_first else ()]
    back = back.T if out_first else back
    found = product(jnp.asarray(x), whole, scale, out_first=out_first, quantize="w8")
    np.testing.assert_allclose(found, x.astype(np.float64) @ back, rtol=1e-5, atol=1e-5)
    x8, of_token = in_8_bits(jnp.asarray(x))
    wanted = (np.asarray(x8, np.float64) * np.asarray(of_token, np.float64)) @ back
    found = product(jnp.asarray(x), whole, scale, out_first=out_first, quantize="w8a8")
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)  # sums of integers are exact
    np.testing.assert_allclose(found, x @ weight, atol=0.25)


def test_a_token_of_zeros_and_one_alone() -> None:
    x = jnp.asarray(RNG.normal(size=(9, 16)), jnp.float32).at[4].set(0)
    whole, scale = quantise(jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32), 0)
    found = product(x, whole, scale, quantize="w8a8")
    assert not np.asarray(found[4]).any()
    np.testing.assert_array_equal(product(x[2:3], whole, scale, quantize="w8a8")[0], found[2])


@pytest.mark.parametrize("quantize", ["w8", "w8a8"])
def test_nan_is_not_lost_in_integers(quantize: Any) -> None:
    """It ends a request with an error, and must reach the logits for that."""
    x, weight = np.ones((3, 8), np.float32), np.ones((8, 4), np.float32)
    whole, scale = quantise(jnp.asarray(weight), 0)
    for bad in (np.nan, np.inf):
        x[1, 3] = bad
        found = np.isfinite(product(jnp.asarray(x), whole, scale, quantize=quantize)).all(axis=-1)
        assert found.tolist() == [True, False, True]
    weight[2, 1] = np.nan
    found = np.isfinite(product(jnp.ones((2, 8)), *quantise(jnp.asarray(weight), 0), quantize=quantize)).all(axis=0)
    assert found.tolist() == [True, False, True, True]


def plainly(model: Model, mode: Any) -> Model:
    """The floats of a model rounded as its 8-bit form has them: what `w8` must compute."""
    shapes = dict(paths(abstract(dataclasses.replace(model.config, quantize=mode))))

    def rounded(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        if path not in shapes or shapes[path].dtype != jnp.int8:
            return leaf
        axis = leaf.ndim - 2 if path[-1] == "kernel" else leaf.ndim - 1
        whole, scale = quantise(leaf, axis)
        return (whole * jnp.expand_dims(scale, axis)).astype(leaf.dtype)

    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: rounded(tuple(entry.key for entry in path), leaf), model.params
    )
    return dataclasses.replace(model, params=tree)


@pytest.mark.parametrize("name", ["sdar", "llada2", "a2d-qwen3", "llada-moe"])
def test_a_model_in_8_bits_is_the_model_with_rounded_weights(name: str) -> None:
    """Every projection, expert, embedding and head of all kinds of block; norms and routers are left alone."""
    ids = jnp.asarray(families.arrays(name)["forward_ids"][:, :12])
    found = load_model(families.FOLDERS[name], mask_id=families.recorded(name)["mask_token_id"], quantize="w8")
    wanted = plainly(families.load(name), "w8")
    logits = [np.asarray(forward(model.params, model.config, ids)) for model in (found, wanted)]
    np.testing.assert_allclose(*logits, rtol=2e-4, atol=2e-4)
    floats = {path[-2:] for path, leaf in paths(found.params) if leaf.dtype != jnp.int8 and leaf.ndim > 2}
    assert floats <= {("router", "weight"), ("gate", "scale"), ("up", "scale"), ("down", "scale")}


@pytest.mark.full
def test_the_same_tokens_in_any_company() -> None:
    """With `w8a8` close decisions may differ: where a sum's last bit does, an activation may round otherwise."""
    model = load_model(golden.FOLDERS["llada"], quantize="w8")
    engine = Engine(model, cache=CacheConfig(boundary=2, refresh_interval=3), sampling=SamplingConfig(8))
    prompts = [[*range(10, 40), 50 + i, *range(60, 61 + i)] for i in range(5)]
    asked = [{"id": f"{i}", "prompt_ids": prompt, "prefix_len": 30} for i, prompt in enumerate(prompts)]
    together = engine.generate(asked)
    assert [engine.generate(one)[0].token_ids for one in asked[::-1]] == [r.token_ids for r in together[::-1]]
    plain = Engine(load_model(golden.FOLDERS["llada"]), cache=CacheConfig(boundary=2), sampling=SamplingConfig(8))
    assert [r.token_ids for r in plain.generate(asked)] != [r.token_ids for r in together]  # it is another model


def test_mixtures_in_8_bits() -> None:
    config = dataclasses.replace(families.load("llada2").config, quantize="w8a8")
    params = init(config, jax.random.key(0))["mixture"]
    x = jax.random.normal(jax.random.key(1), (33, config.d_model))
    found = np.asarray(mix(config, params, jnp.asarray(1), x))
    floats = jax.tree.map(lambda leaf: leaf, params)
    for name, part in floats.items():
        if "scale" in part:
            axis = part["kernel"].ndim - 2
            floats[name] = {"kernel": part["kernel"] * jnp.expand_dims(part["scale"], axis)}
    wanted = np.asarray(mix(dataclasses.replace(config, quantize="none"), floats, jnp.asarray(1), x))
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    np.testing.assert_array_equal(mix(config, params, jnp.asarray(1), x[5:6])[0], found[5])


def test_half_the_memory_and_its_own_name(tmp_path: Path) -> None:
    folder = golden.FOLDERS["llada"]
    plain, small = load_model(folder, dtype="bfloat16"), load_model(folder, dtype="bfloat16", quantize="w8")
    assert params_bytes(small.params) < 0.56 * params_bytes(plain.params)
    assert small.fingerprint == f"{plain.fingerprint}+w8" and small.checkpoint == plain.fingerprint
    assert small.dtype == plain.dtype == jnp.bfloat16
    convert(folder, tmp_path / "w8a8", dtype="bfloat16", quantize="w8a8")
    kept = load_model(tmp_path / "w8a8", dtype="bfloat16")
    wanted = load_model(folder, dtype="bfloat16", quantize="w8a8")
    assert kept.config == wanted.config and kept.fingerprint == wanted.fingerprint
    jax.tree.map(np.testing.assert_array_equal, kept.params, wanted.params)
    assert load_model(tmp_path / "w8a8", dtype="bfloat16", quantize="w8").config.quantize == "w8"  # the same weights


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = golden.FOLDERS["llada"]
    with pytest.raises(BicacheError, match="quantize must be one of none, w8, w8a8, got 'int4'"):
        inspect.unwrap(load_model)(folder, quantize="int4")
    convert(folder, tmp_path / "w8", quantize="w8")
    with pytest.raises(BicacheError, match="its weights are stored in 8 bits"):
        load_model(tmp_path / "w8", quantize="none")
    manifest = tmp_path / "w8" / "bicache.json"
    record = json.loads(manifest.read_text())
    record["params"]["layers.q.weight"]["checksum"] += 1
    manifest.write_text(json.dumps(record))
    with pytest.raises(BicacheError, match=r"layers\.q\.weight is damaged"):
        load_model(tmp_path / "w8")
