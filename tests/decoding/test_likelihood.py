"""Log-probabilities over vocabulary tiles: against whole distributions in float64."""

from __future__ import annotations

import dataclasses

import golden
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import load_model
from bicache_jax.decoding import tiles
from bicache_jax.decoding.likelihood import token_log_p


def test_log_probabilities_over_tiles_are_those_of_whole_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 24)  # the last tile overlaps the one before it, and the vocabulary ends in it
    config = dataclasses.replace(load_model(golden.FOLDERS["llada"]).config, vocab_size=65, mask_id=3)
    rng = np.random.default_rng(0)
    x, head, bias = rng.normal(size=(2, 40, 8)), rng.normal(size=(70, 8)), rng.normal(size=70)
    logits = x @ head[:65].T + bias[:65]
    all_log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = np.where(np.arange(65) == 3, -np.inf, logits).argmax(-1)
    tokens = np.where(rng.random((2, 40)) < 0.5, best, rng.integers(0, 65, (2, 40)))
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, head, bias)]
    found = token_log_p(arrays[0], jnp.asarray(tokens, jnp.int32), (arrays[1], arrays[2], None), config=config)
    np.testing.assert_allclose(found.log_p, np.take_along_axis(all_log_p, tokens[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(found.top, tokens == best)
    assert 0 < np.mean(found.top) < 1
