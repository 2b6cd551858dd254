"""Mixtures of experts: router and experts as a plain loop over tokens has them, whoever else is in the batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax.configs import model_shape
from bicache_jax.core.config import Experts, ModelConfig
from bicache_jax.core.quantized import quantise
from bicache_jax.models import abstract, init, mixture
from bicache_jax.models.mixture import mix, route
from bicache_jax.sharding import Partition

CONFIG = ModelConfig("llada2", 61, 24, 3, 4, 2, 8, 32, 1e4, 1e-6, 64, 5)
KINDS = {
    "softmax": Experts(8, 3, 16),
    "sigmoid": Experts(8, 3, 16, 10, (0,), "sigmoid", renormalise=True, scale=2.5, bias=True, groups=4, top_groups=2),
    "one": Experts(5, 1, 8, renormalise=True),
    "all": Experts(4, 4, 8, 12),
}


def parameters(experts: Experts) -> Any:
    """Random parameters of the mixtures of three layers, or of two behind a dense one."""
    params = init(dataclasses.replace(CONFIG, experts=experts), jax.random.key(1))["mixture"]
    if experts.bias:
        params["router"]["bias"] = jax.random.normal(jax.random.key(2), params["router"]["bias"].shape) * 0.3
    return params


def plain(experts: Experts, params: Any, layer: int, x: np.ndarray) -> np.ndarray:
    """One token after the other, one expert after the other, in float64."""
    own = jax.tree.map(lambda leaf: np.asarray(leaf[layer], np.float64), params)

    def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        gated = x @ gate
        return (gated / (1 + np.exp(-gated)) * (x @ up)) @ down

    made = []
    for token in x.astype(np.float64):
        logits = own["router"]["weight"] @ token
        scores = 1 / (1 + np.exp(-logits)) if experts.score == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        picked = scores + own["router"]["bias"] if experts.bias else scores
        if experts.groups > 1:
            members = picked.reshape(experts.groups, -1)
            best = np.argsort(-np.sort(members, axis=1)[:, -2:].sum(1), kind="stable")[: experts.top_groups]
            allowed = np.repeat(np.isin(np.arange(experts.groups), best), members.shape[1])
            picked = np.where(allowed, picked, -np.inf)
        chosen = np.argsort(-picked, kind="stable")[: experts.per_token]
        weights = scores[chosen] / (scores[chosen].sum() + 1e-20) if experts.renormalise else scores[chosen]
        out = sum(
            w * experts.scale * swiglu(token, *(own[name]["kernel"][e] for name in ("gate", "up", "down")))
            for e, w in zip(chosen, weights, strict=True)
        )
        if experts.d_shared:
            out = out + swiglu(token, *(own[f"shared_{name}"]["kernel"] for name in ("gate", "up", "down")))
        made.append(out)
    return np.asarray(made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [2, 32])
def test_it_is_a_loop_over_tokens(monkeypatch: pytest.MonkeyPatch, kind: str, tile: int) -> None:
    monkeypatch.setattr(mixture, "TILE", tile)
    experts, params = KINDS[kind], parameters(KINDS[kind])
    x = np.random.default_rng(3).normal(size=(37, CONFIG.d_model)).astype(np.float32)
    run = jax.jit(functools.partial(mix, dataclasses.replace(CONFIG, experts=experts)))
    for layer in range(len(params["gate"]["kernel"])):
        found = run(params, jnp.asarray(layer), jnp.asarray(x))
        np.testing.assert_allclose(found, plain(experts, params, layer, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_ragged_products_and_tiles_agree(kind: str) -> None:
    """What TPUs run, and what everything else runs."""
    params = parameters(KINDS[kind])
    stacks = [params[name] for name in ("gate", "up", "down")]
    x, sizes = jax.random.normal(jax.random.key(4), (40, CONFIG.d_model)), jnp.asarray([9, 0, 1, 30, 0, 0, 0, 0])
    found = [form(x, sizes, jnp.asarray(1), *stacks) for form in (mixture._ragged, mixture._tiles)]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_token_gets_the_same_in_any_company(kind: str) -> None:
    """Bit for bit: no capacity, nothing dropped, and no sum over tokens."""
    experts, params = KINDS[kind], parameters(KINDS[kind])
    x = jax.random.normal(jax.random.key(5), (64, CONFIG.d_model))
    run, layer = jax.jit(functools.partial(mix, dataclasses.replace(CONFIG, experts=experts))), jnp.asarray(0)
    whole = np.asarray(run(params, layer, x))
    order = np.random.default_rng(6).permutation(64)
    np.testing.assert_array_equal(run(params, layer, x[order]), whole[order])
    crowd = jnp.broadcast_to(x[7], x.shape).at[11].set(x[3])  # 63 tokens for the same experts
    np.testing.assert_array_equal(run(params, layer, crowd)[np.asarray([0, 11])], whole[np.asarray([7, 3])])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("quantize", ["none", "w8a8"])
def test_shards_with_sets_of_experts_add_up_to_all_of_them(kind: str, quantize: Any) -> None:
    experts = dataclasses.replace(KINDS[kind], d_shared=0)
    config = dataclasses.replace(CONFIG, experts=experts, quantize=quantize)
    params = {name: part for name, part in parameters(KINDS[kind]).items() if not name.startswith("shared")}
    for name in ("gate", "up", "down") if quantize != "none" else ():
        kernel, scale = quantise(params[name]["kernel"], 2)
        params[name] = {"kernel": kernel, "scale": scale}
    x = jax.random.normal(jax.random.key(7), (40, CONFIG.d_model))
    whole = mix(config, params, jnp.asarray(1), x)
    shards = 4
    part = dataclasses.replace(config, experts=dataclasses.replace(experts, cut="expert", held=experts.num // shards))

    def cut(leaf: jax.Array) -> jax.Array:
        return jnp.stack(jnp.split(leaf, shards, axis=1))

    own = {name: jax.tree.map(cut, stack) if name != "router" else stack for name, stack in params.items()}
    axes = {name: 0 if name != "router" else None for name in own}
    run = jax.vmap(lambda own: mix(part, own, jnp.asarray(1), x, axis="model"), in_axes=(axes,), axis_name="model")
    parts = run(own)
    np.testing.assert_allclose(parts.sum(0), whole, rtol=2e-5, atol=2e-5)
    assert np.abs(parts).max(axis=(1, 2)).all(), "every shard has some"
    assert dataclasses.replace(part, d_mlp=CONFIG.d_mlp // shards).mlp_columns * shards == config.mlp_columns


@pytest.mark.parametrize(
    ("shape", "shards", "cut", "held", "width"),
    [
        ("llada2_mini", 8, "expert", 32, 512),  # by width 64 columns, half a tile
        ("llada2_mini", 4, "width", None, 128),
        ("llada_moe_7b", 8, "width", None, 128),
        ("llada_moe_7b", 1, "width", None, 1024),
    ],
)
def test_experts_are_cut_as_takes_less_memory(shape: str, shards: int, cut: str, held: int | None, width: int) -> None:
    partition = Partition(model_shape(shape), shards)
    experts = partition.local.experts
    assert experts is not None and (experts.cut, experts.held, experts.d_expert) == (cut, held, width)
    whole = abstract(partition.config)["mixture"]["gate"]["kernel"].shape
    mine = abstract(partition.local)["mixture"]["gate"]["kernel"].shape
    assert math.prod(whole) == shards * math.prod(mine)


def test_equal_scores_go_to_the_lower_expert() -> None:
    router = {"weight": jnp.zeros((6, 4))}
    chosen, weights = route(Experts(6, 2, 4), router, jnp.ones((3, 4)))
    assert chosen.tolist() == [[0, 1]] * 3
    np.testing.assert_allclose(weights, 1 / 6, rtol=1e-6)


def test_experts_that_cannot_be_picked_are_refused() -> None:
    with pytest.raises(ValueError, match="experts per token must be from 1 to 4, got 5"):
        Experts(4, 5, 8)
    with pytest.raises(ValueError, match="8 experts cannot be picked from 5 of 4 groups"):
        Experts(8, 2, 8, groups=4, top_groups=5)


def test_counts_of_the_published_shapes() -> None:
    """Parameters, and those that a token runs through, as their names say."""
    for name, billions in {"llada_moe_7b": 7.4, "llada2_mini": 16.3, "sdar_8b": 8.2, "sdar_4b": 4.0}.items():
        leaves = jax.tree.leaves(abstract(model_shape(name)))
        assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(billions, abs=0.1), name
    assert families.load("llada2").config.mlp_columns == pytest.approx((128 + 2 * (3 * 32 + 32)) / 3)
