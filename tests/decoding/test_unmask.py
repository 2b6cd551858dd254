"""The head's running statistics and the rules over them, against plain NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax.core.cache import Draw
from bicache_jax.core.config import REMASKING, ModelConfig, SamplingConfig
from bicache_jax.decoding import head
from bicache_jax.decoding.rules import RULES, ranks
from bicache_jax.decoding.schedule import even_counts, make_decoding, span_size, time_counts

MASK = 5
CONFIG = ModelConfig("llada", 32, 8, 2, 2, 2, 4, 16, 1e4, 1e-5, 64, MASK)


def _draw(**settings: Any) -> Draw:
    off = dataclasses.asdict(make_decoding(CONFIG, SamplingConfig(8), 0, 1).draw)
    return Draw(**{name: jnp.asarray(settings.get(name, value), value.dtype) for name, value in off.items()})


def _choose(
    hidden: np.ndarray, table: np.ndarray, noise: float = 0.0, scale: float = 1.0, seed: int = 0, **settings: Any
) -> head.Choice:
    keys = jax.random.split(jax.random.key(seed), hidden.shape[:2])
    return head.choose(
        jnp.asarray(hidden, jnp.float32),
        jnp.asarray(table, jnp.float32),
        config=dataclasses.replace(CONFIG, vocab_size=len(table)),
        draw=_draw(noise=noise, scale=scale, **settings),
        keys_bw=keys,
    )


@pytest.mark.parametrize("tile", [7, 16, 50, 64])
def test_statistics_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(head, "TILE", tile)
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(2, 3, 8)), rng.normal(size=(50, 8)) * 3
    table[MASK] *= 4  # the mask token often has the highest logit, and is never chosen
    logits = hidden @ table.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    allowed = np.where(np.arange(50) == MASK, -np.inf, logits)
    token = allowed.argmax(-1)
    chosen = np.take_along_axis(p, token[..., None], -1)[..., 0]
    others = np.where(np.arange(50) == token[..., None], 0, p)
    found = _choose(hidden, table)
    assert MASK in logits.argmax(-1)
    np.testing.assert_array_equal(found.token, token)
    np.testing.assert_allclose(found.log_odds, np.log(chosen) - np.log(others.sum(-1)), rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(found.margin, chosen - others.max(-1), atol=1e-5)
    np.testing.assert_allclose(found.entropy, -(p * np.log(p)).sum(-1), rtol=2e-4, atol=1e-20)


@pytest.mark.parametrize(("tile", "vocab_size"), [(5, 6), (1, 8)])
def test_a_tile_of_nothing_but_the_mask_token(monkeypatch: pytest.MonkeyPatch, tile: int, vocab_size: int) -> None:
    monkeypatch.setattr(head, "TILE", tile)
    logits = np.random.default_rng(1).normal(size=(1, 2, vocab_size))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = _choose(logits, np.eye(vocab_size))
    assert np.array_equal(found.token, np.where(np.arange(vocab_size) == MASK, -np.inf, logits).argmax(-1))
    np.testing.assert_allclose(found.entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)
    chosen = np.take_along_axis(p, np.asarray(found.token)[..., None], -1)[..., 0]
    np.testing.assert_allclose(jax.nn.sigmoid(found.log_odds), chosen, rtol=1e-5)


def test_confidence_does_not_saturate_where_probabilities_round_to_one() -> None:
    table = np.zeros((16, 2))
    table[3] = [1, 0]
    found = _choose(np.asarray([[[40.0, 0], [60.0, 0]]]), table)
    p = np.asarray(jax.nn.sigmoid(found.log_odds), np.float32)
    assert p.tolist() == [[1.0, 1.0]] and found.log_odds[0, 0] < found.log_odds[0, 1] - 15


@pytest.mark.parametrize(("noise", "scale"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_noise_samples_the_softmax_at_its_temperature(noise: float, scale: float) -> None:
    logits = np.asarray([0.0, 1.0, 2.0, -1.0, 0.5, 9.0, 1.5])
    draws = 4000
    hidden = np.ones((draws, 1, 1))
    found = np.asarray(_choose(hidden, logits[:, None], noise, scale, seed=3).token)[:, 0]
    sharp = np.where(np.arange(7) == MASK, -np.inf, logits * scale / noise)
    wanted = np.exp(sharp) / np.exp(sharp).sum()
    counts = np.bincount(found, minlength=7) / draws
    np.testing.assert_allclose(counts, wanted, atol=4 * 0.5 / np.sqrt(draws))


def test_ties_go_to_the_lower_token_and_position() -> None:
    assert int(_choose(np.ones((1, 1, 1)), np.ones((9, 1))).token[0, 0]) == 0
    score = jnp.asarray([[1.0, 2.0, 2.0, 2.0, 3.0]])
    candidate = jnp.asarray([[True, True, True, True, False]])
    assert ranks(score, candidate).tolist() == [[3, 0, 1, 2, 0]]


def test_rules_order_positions_as_they_say() -> None:
    choice = head.Choice(*(jnp.asarray([values]) for values in ([1, 2], [0.5, 0.9], [0.3, 0.1], [2.0, 1.0])))
    noise = jnp.zeros((1, 2))
    first = {name: int(jnp.argmax(rule(choice, noise).order)) for name, rule in zip(REMASKING, RULES, strict=True)}
    assert {name: first[name] for name in ("low_confidence", "maskgit_plus", "topk_margin", "entropy")} == {
        "low_confidence": 1,
        "maskgit_plus": 1,
        "topk_margin": 0,
        "entropy": 1,
    }


def test_random_order_is_uniform() -> None:
    noise = jax.random.gumbel(jax.random.key(1), (3000, 3))
    scores = np.asarray(RULES[REMASKING.index("random")](head.Choice(*[jnp.zeros((3000, 3))] * 4), noise).order)
    np.testing.assert_allclose(np.bincount(scores.argmax(1), minlength=3) / 3000, 1 / 3, atol=0.04)


@hypothesis.given(st.integers(1, 300), st.integers(1, 400), st.booleans())
def test_any_schedule_unmasks_everything_and_nothing_twice(masks: int, steps: int, anchored: bool) -> None:
    even = even_counts(masks, steps)
    assert even.sum() == masks and even.max() - even.min() <= 1 and (np.diff(even) <= 0).all()
    timed = time_counts(masks, steps, anchored=anchored, eps=1e-3)
    assert timed.sum() == masks and (timed >= 0).all() and len(timed) == steps


def test_schedules_of_a_batch() -> None:
    assert even_counts(32, 10).tolist() == [4, 4, 3, 3, 3, 3, 3, 3, 3, 3]
    for masks, steps in ((32, 16), (32, 10), (8, 4), (5, 9)):
        assert even_counts(masks, steps).sum() == masks == time_counts(masks, steps, anchored=False, eps=1e-3).sum()
    assert time_counts(8, 4, anchored=True, eps=1e-3)[0] == 1
    decoding = make_decoding(CONFIG, SamplingConfig(24, 12, 8, threshold=0.9), 3, 4, block_cache="dual", num_counts=16)
    assert (
        decoding.counts.tolist() == [[2, 2, 2, 2] + [0] * 12] * 2 and bool(decoding.dual) and not bool(decoding.anchor)
    )
    sampling = SamplingConfig(24, 12, 8)
    assert [span_size(sampling, kind, block) for kind in ("off", "prefix", "dual") for block in (0, 2)] == [
        *(0, 0),
        *(24, 8),
        *(8, 8),
    ]
