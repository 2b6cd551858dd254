"""How far a prefix cache moves predictions: against float64, over families, vocabulary tiles and meshes."""

from __future__ import annotations

import dataclasses

import families
import golden
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import CacheConfig, Engine, Model, Request, SamplingConfig, load_model
from bicache_jax.decoding import tiles
from bicache_jax.decoding.drift import divergence
from bicache_jax.functional import forward
from bicache_jax.serving.grouping import Row


def _nats(model: Model, prompt: tuple[int, ...], prefix_len: int, boundary: int, length: int) -> tuple[float, float]:
    row = Row(Request("r", prompt, prefix_len, SamplingConfig(length, length, 4)), 0, prefix_len, 50, boundary)
    policy = "exact" if model.config.block_causal else "naive"
    return Engine(model, cache=CacheConfig(policy=policy)).executor.drift(row)


def test_divergence_over_tiles_is_that_of_whole_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 24)  # the last tile overlaps the one before it, and the vocabulary ends in it
    config = dataclasses.replace(load_model(golden.FOLDERS["llada"]).config, vocab_size=65, mask_id=3)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2, 3, 8))
    head, bias = rng.normal(size=(70, 8)), rng.normal(size=70)
    a, b = (hidden @ head[:65].T + bias[:65] for hidden in (x, y))
    a, b = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)) for logits in (a, b))
    wanted = (np.exp(a) * (a - b)).sum(-1)
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, y, head, bias)]
    found = divergence(*arrays[:2], (arrays[2], arrays[3], None), config=config)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert not np.any(divergence(arrays[0], arrays[0], (arrays[2], None, None), config=config))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_drift_is_that_of_whole_logits(family: str) -> None:
    """A prefix that all layers reuse is one that sees only itself: two blocks under block-causal attention."""
    model, length = load_model(golden.FOLDERS[family]), 8
    config, prompt = model.config, tuple(range(20, 60))
    ids = jnp.asarray([[*prompt, *[config.mask_id] * length]])
    apart = dataclasses.replace(config, attention="block_causal", block_length=33)
    plain, cached = (
        _log_softmax(forward(model.params, seen, ids)[0])[40 - config.shifted :][:length] for seen in (config, apart)
    )
    nats = (np.exp(plain) * (plain - cached)).sum(-1)
    np.testing.assert_allclose(
        _nats(model, prompt, 33, config.num_layers, length), (nats.mean(), nats.max()), rtol=1e-3
    )
    assert nats.max() > 1e-3
    assert max(_nats(model, prompt, 33, 0, length)) < 1e-6, "b = 0 computes everything"


@pytest.mark.full
def test_an_exact_cache_moves_nothing() -> None:
    model = families.load("sdar")
    assert max(_nats(model, tuple(range(20, 42)), 16, model.config.num_layers, 8)) < 1e-6
