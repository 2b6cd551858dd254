"""Filters, rules and schedules against plain NumPy, and against the distributions that they promise."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis.extra import numpy as arrays

from bicache_jax.core.cache import Decoding
from bicache_jax.core.config import REMASKING, ModelConfig, SamplingConfig
from bicache_jax.decoding import filters, head
from bicache_jax.decoding.filters import floors, in_chunks
from bicache_jax.decoding.head import choose, guide
from bicache_jax.decoding.rules import RULES, by_confidence, order, ranks
from bicache_jax.decoding.schedule import chance_bars, make_decoding
from bicache_jax.models import dream

MASK, VOCAB = 5, 32
LLADA = ModelConfig("llada", VOCAB, 8, 2, 2, 2, 4, 16, 1e4, 1e-5, 64, MASK, eos_ids=(3, 9, 11), eot_ids=(11,))
DREAM = dataclasses.replace(LLADA, family="dream", **dream.LOOP)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 4},
    {"top_p": 0.8, "temperature": 0.5},
    {"top_p": 0.9, "top_k": 6, "temperature": 2.0},
    {"logits_eos_inf": True},
    {"confidence_eos_eot_inf": True},
    {"confidence_eos_eot_inf": True, "logits_eos_inf": True, "temperature": 1.0, "top_p": 0.6},
]


@functools.partial(jax.jit, static_argnames=("config",))
def _choose(logits: jax.Array, keys: jax.Array, decoding: Decoding, config: ModelConfig) -> tuple[Any, ...]:
    choice = choose(logits, jnp.eye(VOCAB), config=config, draw=decoding.draw, keys_bw=keys)
    noise = jax.vmap(jax.vmap(jax.random.gumbel))(keys)
    tokens = jax.vmap(jax.vmap(lambda key: reference.noise_of(key, VOCAB)))(keys)
    return choice, noise, tokens, [rule(choice, noise) for rule in RULES]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_choices_and_scores_equal_plain_numpy(family: str) -> None:
    config = {"llada": LLADA, "dream": DREAM}[family]
    rng = np.random.default_rng(3)
    for number, settings in enumerate(SETTINGS):
        logits = rng.normal(size=(3, 5, VOCAB)).astype(np.float32) * 3
        logits[0, :, 9] += 9  # an end of text, mostly the first choice
        logits[1, :, MASK] += 9  # the mask token, which is never chosen
        keys = jax.random.split(jax.random.key(number), (3, 5))
        decoding = make_decoding(config, SamplingConfig(8, **settings), 0, 1)
        choice, order_noise, token_noise, scores = _choose(jnp.asarray(logits), keys, decoding, config)
        for (row, place), (at, rule) in itertools.product(np.ndindex(3, 5), enumerate(REMASKING)):
            token, log_odds, score, confidence, _ = reference.scores_of(
                logits[row, place].astype(np.float64),
                np.asarray(token_noise[row, place], np.float64),
                float(order_noise[row, place]),
                config,
                SamplingConfig(8, remasking=rule, **settings),
                place=place,
            )
            assert choice.token[row, place] == token, (settings, row, place)
            found = choice.log_odds[row, place], scores[at].order[row, place], scores[at].confidence[row, place]
            wanted = np.clip((log_odds, score, confidence), -1e30, 1e30)
            np.testing.assert_allclose(np.clip(found, -1e30, 1e30), wanted, rtol=2e-4, atol=2e-5)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    arrays.arrays(np.float32, (3, 40), elements=st.floats(-30, 30, width=16)),
    st.floats(0.05, 1.0),
    st.integers(1, 45),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_filters_keep_what_sorting_keeps(logits: np.ndarray, top_p: float, top_k: int, sharpness: float) -> None:
    p32 = np.float32(top_p)
    found = logits >= np.asarray(_floors(logits, np.float32(sharpness), p32, np.int32(top_k)))[:, None]
    for row, kept in zip(logits.astype(np.float64), found, strict=True):
        weight = np.exp((row - row.max()) * sharpness)
        above = np.asarray([weight[row > value].sum() for value in row]) / weight.sum()
        more = np.asarray([(row > value).sum() for value in row])
        wanted = ((above <= p32) | (p32 == 1)) & (more < top_k)
        near = (np.abs(above - p32) < 1e-5) & (p32 < 1)  # float32 may see these either way
        assert ((kept == wanted) | near).all()
        assert kept[row.argmax()] and row[kept].min() >= row[~kept].max(initial=-np.inf)


_floors = jax.jit(lambda x, s, p, k: floors(x, sharpness=s, top_p=p, top_k=k))


def test_filters_see_a_few_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = jnp.arange(2 * 7 * 3, dtype=jnp.float32).reshape(2, 7, 3), []
    for most in (1, 2 * VOCAB, 5 * VOCAB, 1 << 20):
        monkeypatch.setattr(filters, "LOGITS", most)

        def total(chunk: jax.Array) -> jax.Array:
            seen.append(chunk.shape[0])
            return chunk.sum(-1)

        np.testing.assert_array_equal(in_chunks(total, x, VOCAB), x.sum(-1))
    assert set(seen) == {1, 2, 5, 14}


def test_filtered_sampling_has_the_nucleus_as_its_distribution() -> None:
    draws, top_p, temperature = 4000, 0.85, 0.8
    logits = np.random.default_rng(0).normal(size=VOCAB) * 2
    keys = jax.random.split(jax.random.key(4), (draws, 1))
    for config in (LLADA, DREAM):
        sampling = SamplingConfig(8, top_p=top_p, temperature=temperature)
        hidden = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 1, VOCAB))
        found = np.asarray(_choose(hidden, keys, make_decoding(config, sampling, 0, 1), config)[0].token)
        p = reference.softmax(np.where(np.arange(VOCAB) == MASK, -np.inf, logits) / temperature)
        rank = np.argsort(-p)
        p[rank[np.cumsum(p[rank]) - p[rank] > top_p]] = 0
        p /= p.sum()
        assert 3 < (p > 0).sum() < VOCAB - 3
        counts = np.bincount(found[:, 0], minlength=VOCAB) / draws
        assert not counts[p == 0].any()
        np.testing.assert_allclose(counts, p, atol=4 * 0.5 / np.sqrt(draws))  # four standard deviations at most


def test_alg_temperature_draws_positions_without_replacement() -> None:
    draws, confidence, temperature = 6000, np.asarray([0.9, 0.5, 0.2, 0.7]), 0.4
    log_odds = jnp.broadcast_to(jnp.asarray(np.log(confidence / (1 - confidence)), jnp.float32), (draws, 4))
    choice = head.Choice(jnp.zeros((draws, 4), jnp.int32), log_odds, log_odds, log_odds)
    noise = jax.random.gumbel(jax.random.key(2), (draws, 4))
    rule = jnp.asarray(REMASKING.index("maskgit_plus"))
    candidate = jnp.ones((draws, 4), bool)
    rank = np.asarray(ranks(order(rule, choice, noise, jnp.float32(temperature)), candidate))
    p = reference.softmax(confidence / temperature)
    bound = 4 * 0.5 / np.sqrt(draws)
    np.testing.assert_allclose((rank == 0).mean(0), p, atol=bound)
    pair = ((rank[:, 0] == 0) & (rank[:, 1] == 1)).mean()
    np.testing.assert_allclose(pair, p[0] * p[1] / (1 - p[0]), atol=bound)
    cold = np.asarray(ranks(order(rule, choice, noise, jnp.float32(0)), candidate))
    assert (cold == [0, 2, 3, 1]).all()


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_origin_unmasks_each_token_by_its_own_chance(eps: float) -> None:
    steps, draws = 4, 20000
    noise = np.asarray(jax.random.gumbel(jax.random.key(9), (draws,)))
    times = np.linspace(1, eps, steps + 1)
    for step, bar in enumerate(chance_bars(steps, eps=eps)):
        share = 1 - times[step + 1] / times[step] if step < steps - 1 else 1.0
        np.testing.assert_allclose((noise > bar).mean(), share, atol=4 * 0.5 / np.sqrt(draws))
    assert chance_bars(1, eps=eps).tolist() == [-np.inf]


def _published_factor_count(confidence: list[float], factor: float) -> int:
    """How many of the sorted candidates Fast-dLLM's loop unmasks: it stops at the first that falls short."""
    limits = [-1.0] + [1 - factor / (n + 1) for n in range(2, len(confidence) + 1)]
    short = [place for place, (p, limit) in enumerate(zip(confidence, limits, strict=True)) if p < limit]
    stop = short[0] if short else len(confidence) - 1
    return stop + 1 if stop in (0, len(confidence) - 1) else stop


@hypothesis.given(st.lists(st.floats(0.05, 0.98), min_size=1, max_size=8, unique=True), st.floats(0.2, 3.0))
def test_factor_rule_is_the_published_one(confidence: list[float], factor: float) -> None:
    p = np.asarray(confidence)
    n = np.arange(2, len(p) + 1)
    hypothesis.assume((np.abs(np.sort(p)[::-1][1:] - (1 - factor / (n + 1))) > 1e-5).all())
    width = 10
    values = np.full((1, width), 0.99)
    values[0, 1 : len(p) + 1] = p
    candidate = (np.arange(width) > 0) & (np.arange(width) <= len(p))
    chosen = np.asarray(_by_confidence(np.log(values / (1 - values)), candidate[None], 1.0, factor))[0]
    count = _published_factor_count(sorted(confidence, reverse=True), factor)
    assert set(np.flatnonzero(chosen)) == {1 + place for place in np.argsort(-p, kind="stable")[:count]}


@hypothesis.given(st.lists(st.floats(0.05, 0.98), min_size=1, max_size=8, unique=True), st.floats(0.1, 1.0))
def test_threshold_unmasks_all_that_reach_it_and_one_at_least(confidence: list[float], threshold: float) -> None:
    p = np.asarray(confidence)
    hypothesis.assume((np.abs(p - threshold) > 1e-5).all())
    values = np.full((1, 10), 0.99)
    values[0, : len(p)] = p
    chosen = np.asarray(_by_confidence(np.log(values / (1 - values)), np.arange(10)[None] < len(p), threshold, 0.0))
    assert set(np.flatnonzero(chosen[0])) == {int(p.argmax()), *map(int, np.flatnonzero(p >= threshold))}


@hypothesis.given(st.lists(st.floats(0.01, 4.0), min_size=1, max_size=8, unique=True), st.floats(0.05, 8.0))
def test_entropy_rule_unmasks_by_ascending_entropy_below_the_bound(entropies: list[float], bound: float) -> None:
    values = np.full((1, 10), 1e-3)
    values[0, : len(entropies)] = entropies
    ascending = np.argsort(values[0, : len(entropies)], kind="stable")
    sums = np.cumsum(values[0, ascending])
    hypothesis.assume((np.abs(sums - bound) > 1e-5).all())
    chosen = np.asarray(_by_confidence(values, np.arange(10)[None] < len(entropies), 1.0, 0.0, bound, least=3))
    assert set(np.flatnonzero(chosen[0])) == set(ascending[: max(1, int((sums < bound).sum()))])


@functools.partial(jax.jit, static_argnames="least")
def _by_confidence(
    statistic: Any, candidate: Any, threshold: Any, factor: Any, bound: Any = np.inf, *, least: int = 1
) -> jax.Array:
    some = jnp.asarray(statistic, jnp.float32)
    choice = head.Choice(jnp.zeros(some.shape, jnp.int32), some, some, some)
    at_least = jnp.full(len(statistic), least, jnp.int32)
    rule = (jnp.float32(threshold), jnp.float32(factor), jnp.float32(bound))
    return by_confidence(choice, jnp.asarray(candidate), at_least, *rule)


def test_guided_hidden_states_give_guided_logits() -> None:
    rng = np.random.default_rng(1)
    some, none = (rng.normal(size=(2, 3, 8)).astype(np.float32) for _ in range(2))
    table, bias = rng.normal(size=(VOCAB, 8)), rng.normal(size=VOCAB)
    c, u = some @ table.T + bias, none @ table.T + bias
    guided = np.asarray(guide(jnp.asarray(some), jnp.asarray(none), jnp.float32(2.5)))
    np.testing.assert_allclose(guided @ table.T + bias, u + 2.5 * (c - u), atol=1e-5)
