"""What lm-evaluation-harness asks for, as requests: generation arguments, stops, windows."""

from __future__ import annotations

import pytest

from bicache_jax import BicacheError
from bicache_jax.harness.asked import cut_at, name_of, settings_of, stops_of, windows


@pytest.mark.parametrize(
    ("arguments", "gen_length", "fields"),
    [
        ({}, None, {"gen_length": 256}),
        ({"until": "\n\n", "max_gen_toks": 32}, None, {"gen_length": 32, "stop": ["\n\n"]}),
        ({"until": ["a", "", "b"], "max_gen_toks": 32}, 64, {"gen_length": 64, "stop": ["a", "b"]}),
        ({"do_sample": False, "temperature": 0.7}, 8, {"gen_length": 8}),
        ({"max_gen_toks": None, "max_new_tokens": 16}, None, {"gen_length": 16}),
        ({"max_gen_toks": "many"}, 4, {"gen_length": 4}),
        ({"do_sample": True}, 8, {"gen_length": 8, "temperature": 1.0}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": None}, 8, {"gen_length": 8, "temperature": 0.7, "top_p": 0.9}),
    ],
)
def test_arguments_of_generation(arguments, gen_length, fields) -> None:
    assert settings_of(arguments, gen_length) == fields


@pytest.mark.parametrize("length", ["32", 2.5, True, 0])
def test_lengths_are_numbers_of_tokens(length) -> None:
    with pytest.raises(BicacheError, match="max_gen_toks must be an integer"):
        settings_of({"max_gen_toks": length}, None)


def test_arguments_that_mean_nothing_are_named() -> None:
    with pytest.warns(UserWarning, match="num_beams"):
        assert settings_of({"num_beams": 4}, 8) == {"gen_length": 8}


def test_texts_end_at_the_first_stop() -> None:
    assert cut_at("one\ntwo Q: three", ["Q:", "\n"]) == "one"
    assert cut_at("one", stops_of({"until": []})) == "one"


def test_windows_predict_each_token_once_behind_what_there_is_room_for() -> None:
    found = list(windows(range(10), -1, 5))
    assert found == [((-1,), (0, 1, 2, 3)), ((3,), (4, 5, 6, 7)), ((5, 6, 7), (8, 9))]
    assert [len(context) + len(own) for context, own in found] == [5, 5, 5]
    assert list(windows((), -1, 5)) == []
    with pytest.raises(BicacheError, match="at least 2"):
        list(windows((1,), -1, 1))


def test_names_follow_from_what_is_asked() -> None:
    assert name_of("a", {"x": 1}) == name_of("a", {"x": 1}) != name_of("a", {"x": 2})
