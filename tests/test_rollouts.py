"""The example of reinforcement learning: shapes stay, prefixes do not, and the new weights answer."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import numpy as np
import pytest

from bicache_jax import CacheConfig, Engine, Model, Result, SamplingConfig, load_model
from bicache_jax.models import init

rollouts = importlib.import_module("examples.rollouts")


def small_model() -> Model:
    """Random weights of few layers behind the bundled tokenizer: unoptimised code is slow on the bundled model."""
    model = load_model("example", dtype="float32")
    config = dataclasses.replace(
        model.config, d_model=16, d_mlp=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8
    )
    return dataclasses.replace(model, config=config, params=init(config, jax.random.key(0)))


def test_rounds_compile_once_encode_anew_and_go_on_with_the_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    sampling = SamplingConfig(gen_length=rollouts.RESPONSE, temperature=1.0, steps=2)
    engine = Engine(model, cache=CacheConfig(policy="bicache", boundary=1), sampling=sampling)
    asked = rollouts.prompts(10_000, 2, ("list",))
    monkeypatch.setattr(rollouts, "prompts", lambda *_: asked)  # the same ones in every round: nothing else is new
    monkeypatch.setattr(rollouts, "rule", lambda result, _: float(sum(result.token_ids) % 2))
    settings: dict[str, Any] = {"rounds": 3, "count": 2, "samples": 4, "rate": 0.05, "kinds": ("list",), "seed": 10_000}
    seen: list[Any] = [model.params]
    for done in rollouts.train(engine, **settings):
        assert (done.compilations > 0) == (len(seen) == 1), "only the first round compiles"
        assert done.encoded == 2, "the old weights' prefixes are not used"
        seen.append(engine.model.params)
    assert len(seen) == 4 and engine.model.fingerprint == ""
    moved = [float(np.max(np.abs(b["embed"] - a["embed"]))) for a, b in zip(seen, seen[1:], strict=False)]
    assert max(moved) > 1e-3
    found = engine.generate(asked)
    fresh = Engine(dataclasses.replace(model, params=seen[-1]), cache=engine.cache, sampling=sampling)
    assert found == fresh.generate(asked)
    assert found != Engine(model, cache=engine.cache, sampling=sampling).generate(asked)


@pytest.mark.full
def test_the_update_makes_better_responses_likelier() -> None:
    model = small_model()
    optimizer = rollouts.optax.sgd(0.5)
    update = rollouts.make_update(model.config, optimizer)
    rng = np.random.default_rng(0)
    prompt = model.tokenizer.encode("Mara lives in Oslo . where does Mara live") if model.tokenizer else ()
    results = [Result("x", token_ids=tuple(rng.integers(4, 100, rollouts.RESPONSE).tolist())) for _ in range(2)]
    gains = rollouts.advantages(np.asarray([[1.0, 0.0]]))
    assert gains.tolist() == [[0.5, -0.5]]
    batch = rollouts.masked_batch(rng, [prompt] * 2, results, gains, model.config.mask_id)
    ids, targets, weights, valid = batch
    hidden = ids != targets
    assert hidden.any(axis=1).all() and not hidden[:, : len(prompt)].any() and not (hidden & ~valid).any()
    np.testing.assert_allclose(weights.sum(axis=1), [0.5, -0.5], rtol=1e-6)
    params, state = model.params, optimizer.init(model.params)
    losses = []
    for _ in range(2):
        params, state, loss = update(params, state, *batch)
        losses.append(float(loss))
    assert losses[1] < losses[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_prompts_fit_into_the_update() -> None:
    model = load_model("example", dtype="float32")
    assert model.tokenizer is not None
    for seed in range(10_000, 10_003):
        asked = rollouts.prompts(seed, 16, ("list",))
        longest = max(len(model.tokenizer.encode(one["prompt"])) for one in asked)
        assert len(asked) == 16 and longest + rollouts.RESPONSE <= rollouts.LENGTH
