"""The prefix store: prefixes outlive calls within a budget, and change no token."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import golden
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bicache_jax import BicacheError, CacheConfig, Engine, Model, Request, SamplingConfig, load_model
from bicache_jax.serving.placement import Piece
from bicache_jax.serving.store import Key, PrefixStore

SYSTEM = tuple(range(20, 60))


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(golden.FOLDERS["llada"])


def ask(name: str, *rest: int, prefix: tuple[int, ...] = SYSTEM) -> Request:
    """A request over a prefix, `SYSTEM` by default."""
    return Request(name, prefix + rest, len(prefix), SamplingConfig(8, 4))


def engine(model: Model, boundary: Any = 2, budget: int | None = None, **cache: Any) -> Engine:
    """An engine with one boundary, or a table."""
    kind = {"table": boundary} if isinstance(boundary, dict) else {"boundary": boundary}
    return Engine(model, cache=CacheConfig(refresh_interval=2, **kind, **cache), prefix_cache_bytes=budget)


def test_three_calls_with_one_system_message_encode_it_once(model: Model) -> None:
    kept = engine(model)
    calls = [ask("a", 70), ask("b", 71, 72), ask("c", 73)]
    before = [kept.generate(request)[0] for request in calls]
    assert (kept.stats.prefixes_encoded, kept.stats.prefix_hits) == (1, 2)
    stats = kept.prefixes.stats
    assert (stats.entries, stats.hits, stats.misses, stats.evictions) == (1, 2, 1, 0)
    assert 0 < stats.nbytes <= stats.budget and stats.flops_saved > 0 and SYSTEM in kept.prefixes
    compiled = kept.stats.compilations
    assert kept.generate(ask("d", 90))[0].prefix_len == 40 and kept.stats.compilations == compiled
    forgetful = engine(model, budget=0)
    assert [forgetful.generate(request)[0] for request in calls] == before
    assert forgetful.stats.prefixes_encoded == 3 and len(forgetful._store) == 0


def test_what_has_no_room_on_the_device_waits_in_the_host_s_memory(model: Model) -> None:
    plain = engine(model, budget=0)
    one = engine(model)
    one.generate(ask("a", 70))
    size = one.prefixes.stats.nbytes
    tight = Engine(
        model,
        cache=CacheConfig(boundary=2, refresh_interval=2),
        prefix_cache_bytes=size,
        prefix_host_bytes=2 * size,
    )
    prefixes = [SYSTEM, (*SYSTEM[:-1], 7), (*SYSTEM[:-1], 8), (*SYSTEM[:-1], 9)]
    for number, which in enumerate((0, 1, 2, 3, 2, 1, 0)):
        request = ask(f"{number}", 70, prefix=prefixes[which])
        assert tight.generate(request) == plain.generate(request)
    stats = tight.prefixes.stats
    assert (stats.host_hits, stats.misses) == (2, 5)  # the first was pushed out of both
    assert stats.nbytes == size and stats.host_nbytes == 2 * size
    tight.prefixes.clear()
    assert tight.prefixes.stats.host_nbytes == 0
    with pytest.raises(BicacheError, match="prefix_host_bytes must be >= 0"):
        Engine(model, cache=CacheConfig(boundary=2), prefix_host_bytes=-1)


def test_a_prefix_is_shared_within_its_namespace_only(model: Model) -> None:
    kept = engine(model)
    calls = [("", "a"), ("one", "a"), ("two", "a"), ("one", "b"), ("", "b")]
    found = [kept.generate(ask(name, 70), namespace=space)[0] for space, name in calls]
    assert [result.cached_tokens for result in found] == [0, 0, 0, 40, 40]
    assert kept.stats.prefixes_encoded == 3
    assert found[0] == found[1] == found[2] and found[3] == found[4]
    with pytest.raises(TypeError, match="namespace must be a string"):
        inspect.unwrap(Engine.admitted)(kept, ask("a", 70), None, "raise", 5)


@pytest.mark.slow
def test_boundaries_that_alternate_settle_into_one_encoding(model: Model) -> None:
    """A short and a long suffix give a prefix two boundaries; what it was encoded for first is kept with the second."""
    table = {0: 1, 50: 2, 80: 4}
    kept, long = engine(model, table), tuple(range(70, 100))
    found = [kept.generate(ask(f"{i}", *(long if i % 2 else (70,))))[0] for i in range(8)]
    assert {result.boundary for result in found} == {2, 4}
    assert kept.stats.prefixes_encoded <= 4 and kept.prefixes.stats.hits >= 4
    alone = [engine(model, table, 0).generate(ask(f"{i}", *(long if i % 2 else (70,))))[0] for i in range(2)]
    assert [result.token_ids for result in found] == [result.token_ids for result in alone] * 4


@pytest.mark.slow
def test_the_budget_holds_between_runs_and_pinned_prefixes_stay(model: Model) -> None:
    probe = engine(model)
    probe.generate(ask("a", 70))
    size = probe.prefixes.stats.nbytes
    kept = engine(model, budget=2 * size)
    others = [tuple(range(start, start + 40)) for start in (100, 150, 200, 250)]
    kept.prefixes.pin(SYSTEM)
    for number, prefix in enumerate([SYSTEM, *others]):
        kept.generate(ask(f"{number}", 70, prefix=prefix))
        assert kept.prefixes.stats.nbytes <= 2 * size
    assert SYSTEM in kept.prefixes and others[-1] in kept.prefixes and kept.prefixes.stats.evictions == 3
    kept.prefixes.unpin(SYSTEM)
    kept.generate([ask("x", 70, prefix=others[0]), ask("y", 70, prefix=others[1])])
    assert SYSTEM not in kept.prefixes and len(kept._store) == 2
    kept.prefixes.clear()
    assert len(kept._store) == 0 and kept.prefixes.stats.nbytes == 0


@pytest.mark.slow
def test_a_stream_that_is_given_up_lets_its_prefixes_go(model: Model) -> None:
    kept = engine(model, budget=0)
    stream = kept.stream([ask("a", 70), ask("b", 71)], every=1)
    next(stream)
    assert len(kept._store) in (0, 1)  # released with its last batch
    del stream
    assert len(kept._store) == 0


def test_other_weights_forget_what_the_old_ones_made(model: Model) -> None:
    kept = engine(model)
    before = kept.generate(ask("a", 70))[0]
    params = jax.tree.map(lambda leaf: leaf, model.params)
    params["layers"]["down"]["kernel"] = params["layers"]["down"]["kernel"] * 1.5
    kept.update_params(params)
    found = kept.generate(ask("a", 70))[0]
    assert kept.stats.prefixes_encoded == 2 and found.token_ids != before.token_ids
    assert found == engine(dataclasses.replace(model, params=params)).generate(ask("a", 70))[0]
    running = engine(model)
    running.prefixes.pin(SYSTEM)
    stream = running.stream([ask("a", 70)], every=1)
    next(stream)
    running.update_params(params)
    assert list(stream)[-1] == before and SYSTEM not in running.prefixes
    assert running.generate(ask("a", 70))[0] == found
    with pytest.raises(ValueError, match="tree, shapes and dtypes"):
        kept.update_params(params | {"embed": params["embed"][:5]})


@pytest.mark.slow
def test_an_added_prefix_is_that_of_every_prompt_that_begins_with_it(model: Model) -> None:
    """The longest one, alone and in any company; a request's own comes first."""
    kept = engine(model, prefix_detection="messages")
    plain = {"id": "p", "prompt_ids": [*SYSTEM, 70, 71], "gen_length": 8, "steps": 4}
    assert kept.generate(plain)[0].prefix_len == 0
    assert (kept.prefixes.add(list(SYSTEM[:20])), kept.prefixes.add(np.asarray(SYSTEM))) == (20, 40)
    alone = kept.generate(plain)[0]
    company = kept.generate([plain, {"prompt_ids": [*SYSTEM[:30], 9], "gen_length": 8}, {"prompt_ids": [5, 6]}])
    assert alone.prefix_len == 40 and company[0] == alone
    assert [result.prefix_len for result in company] == [40, 20, 0]
    assert kept.generate(plain | {"prefix_len": 4})[0].prefix_len == 4
    kept.prefixes.drop(SYSTEM)
    assert kept.generate(plain)[0].prefix_len == 20 and SYSTEM not in kept.prefixes
    for bad, words in (
        ("text", "no tokenizer"),
        ([1, 999], "outside the vocabulary"),
        ([], "messages"),
        (5, "must be"),
    ):
        with pytest.raises((BicacheError, TypeError), match=words):
            inspect.unwrap(type(kept.prefixes).add)(kept.prefixes, bad)


def test_a_text_and_messages_are_prefixes_too() -> None:
    model = load_model("example")
    kept = Engine(model, cache=CacheConfig(prefix_detection="messages"), sampling=SamplingConfig(gen_length=8))
    document = "Mara lives in Oslo . Tom lives in Rome ."
    count = kept.prefixes.add(document)
    (result,) = kept.generate(f"{document} which town does Mara live in")
    assert result.prefix_len == count > 5 and document in kept.prefixes


class Weak(tuple):  # type: ignore[type-arg]
    """Tokens whose hash says nothing, so that all of them collide."""

    def __hash__(self) -> int:
        return 1


class Store(RuleBasedStateMachine):
    """Any order of uses, against what was put in: never a foreign prefix, and never more than the budget."""

    BUDGET = 2000

    def __init__(self) -> None:
        super().__init__()
        self.store = PrefixStore(self.BUDGET)
        self.used: list[Key] = []
        self.pinned: set[Any] = set()

    def key(self, tokens: list[int], length: int) -> Key:
        return Key(0, Weak(tokens), length, 4, 1)

    @rule(
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        length=st.sampled_from([32, 64]),
        boundary=st.integers(0, 2),
        size=st.integers(1, 120),
    )
    def use(self, tokens: list[int], length: int, boundary: int, size: int) -> None:
        key = self.key(tokens, length)
        found = self.store.get(key, {boundary})
        if found is None:
            mark = np.asarray([*tokens, -1, length, boundary] + [0] * size)
            self.store.put(key, Piece(((mark,),)), {boundary}, nbytes=mark.nbytes, flops=100.0 * size)
        else:
            mark = found.leaves[0][0]
            assert list(mark[: len(tokens) + 3]) == [*tokens, -1, length, boundary], "a foreign prefix"
        self.used.append(key)

    @rule(place=st.integers(0, 20))
    def done(self, place: int) -> None:
        if self.used:
            self.store.done(self.used.pop(place % len(self.used)))

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=3), keep=st.booleans())
    def pin(self, tokens: list[int], keep: bool) -> None:
        (self.store.pin if keep else self.store.unpin)(Weak(tokens))
        (self.pinned.add if keep else self.pinned.discard)(Weak(tokens))

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def drop(self, tokens: list[int]) -> None:
        self.store.drop(Weak(tokens))

    @invariant()
    def what_is_in_use_stays_and_the_rest_is_within_the_budget(self) -> None:
        entries = self.store._entries
        assert all(key in entries for key in self.used)
        loose = [entry.nbytes for key, entry in entries.items() if not entry.users and key.tokens not in self.pinned]
        idle = sum(entry.nbytes for entry in entries.values() if not entry.users)
        assert idle <= self.BUDGET or not loose


Store.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestStore = pytest.mark.slow(Store.TestCase)
