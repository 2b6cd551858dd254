"""Request lines: every one yields a request or an error result, whatever stands in it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import golden
import hypothesis
import hypothesis.strategies as st
import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers

from bicache_jax.checkpoints.tokenizer import Tokenizer
from bicache_jax.core.config import ModelConfig, SamplingConfig
from bicache_jax.core.types import Request, Result
from bicache_jax.serving.requests import is_blank, parse_requests

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _config() -> ModelConfig:
    return dataclasses.replace(golden.model("llada")[0], max_length=64)


def _tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    words = ["<unk>", "[system]", "[user]", "[assistant]", "a", "b", "c", "d"]
    core = Core(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(core, template, {}, ())


def _parse(*lines: Any, tokenizer: Tokenizer | None = None, **sampling: Any) -> list[Request | Result]:
    settings = SamplingConfig(**({"gen_length": 8} | sampling))
    return parse_requests(lines, config=_config(), tokenizer=tokenizer, sampling=settings, source="in.jsonl")


def _fault(line: Any, tokenizer: Tokenizer | None = None) -> str:
    (result,) = _parse(line, tokenizer=tokenizer)
    assert isinstance(result, Result) and result.finish_reason == "error" and result.error
    assert result.error.startswith("in.jsonl, line 1: ") and "\n" not in result.error
    return result.error


def test_fields_override_flags() -> None:
    line = {"prompt_ids": [1, 2, 3], "prefix_len": 2, "gen_length": 16, "steps": 4, "seed": 9, "n": 2, "answer": "x"}
    (request,) = _parse(json.dumps(line), temperature=0.5)
    assert request == Request("1", (1, 2, 3), 2, SamplingConfig(16, 4, seed=9, temperature=0.5), 2, 0)


def test_ids_default_to_the_line_and_may_not_repeat() -> None:
    good = '{"prompt_ids": [1]}'
    found = _parse(good, "", '{"id": "a", "prompt_ids": [1]}', '{"id": "a", "prompt_ids": [1]}', good.encode())
    assert [entry.id for entry in found] == ["1", "a", "4", "5"]
    assert isinstance(found[2], Result) and "'a'" in (found[2].error or "")
    assert [entry.index for entry in found if isinstance(entry, Request)] == [0, 1, 3]


def test_messages_share_the_template_of_all_but_the_last_user_message() -> None:
    messages = [{"role": "system", "content": "a b"}, {"role": "user", "content": "c"}]
    (request,) = _parse({"messages": messages}, tokenizer=_tokenizer())
    assert isinstance(request, Request)
    assert request.prompt_ids == (1, 4, 5, 2, 6, 3) and request.prefix_len == 3
    (samples,) = _parse({"messages": messages, "n": 2}, tokenizer=_tokenizer())
    assert isinstance(samples, Request) and samples.prefix_len is None


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("not json", "JSON"),
        ("[1]", "object"),
        (b"\xff\xfe", "UTF-8"),
        ("[" * 100_000, "JSON"),
        ({}, "exactly one"),
        ({"prompt_ids": [1], "prompt": "a"}, "exactly one"),
        ({"prompt_ids": []}, "no tokens"),
        ({"prompt_ids": [320]}, "vocabulary"),
        ({"prompt_ids": [-1]}, "vocabulary"),
        ({"prompt_ids": [True]}, "integers"),
        ({"prompt_ids": [1] * 60}, "exceed"),
        ({"prompt_ids": [1], "gen_length": 0}, "gen_length"),
        ({"prompt_ids": [1], "gen_length": 10**400}, "gen_length"),
        ({"prompt_ids": [1], "prefix_len": 2}, "prefix_len"),
        ({"prompt_ids": [1], "n": 0}, "'n'"),
        ({"prompt_ids": [1], "seed": -1}, "seed"),
        ({"prompt_ids": [1], "block_length": 3}, "multiple"),
        ({"prompt": "a"}, "prompt_ids"),
        ({"messages": [{"role": "user", "content": "a"}]}, "prompt_ids"),
        ({"id": [], "prompt_ids": [1]}, "'id'"),
        ('{"id": "\\ud800", "prompt_ids": [1]}', "surrogate"),
    ],
)
def test_faults_name_the_line_and_what_is_wrong(line: Any, word: str) -> None:
    assert word in _fault(line)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ({"prompt": ""}, "no tokens"),
        ({"prompt": 3}, "string"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "message"),
    ],
)
def test_faults_of_text(line: Any, word: str) -> None:
    assert word in _fault(line, _tokenizer())


def test_a_template_may_be_missing_or_refuse() -> None:
    line = {"messages": [{"role": "user", "content": "a"}]}
    assert "chat template" in _fault(line, _tokenizer(None))
    assert "no system" in _fault(line, _tokenizer("{{ raise_exception('no system') }}"))
    assert "chat template" in _fault(line, _tokenizer("{{ 1 / 0 }}"))


def test_a_conversation_of_one_message_shares_what_it_shares_with_others() -> None:
    line = {"messages": [{"role": "user", "content": "a b"}]}
    (alone,) = _parse(line, tokenizer=_tokenizer())
    assert isinstance(alone, Request) and alone.prefix_len is None
    insists = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}[user] a"
    line["messages"] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (refused,) = _parse(line, tokenizer=_tokenizer(insists))
    assert isinstance(refused, Request) and refused.prefix_len is None


def test_a_byte_order_mark_is_no_line() -> None:
    good = json.dumps({"prompt_ids": [1]})
    found = _parse(b"\xef\xbb\xbf", b"\xef\xbb\xbf" + good.encode() + b"\r", "\ufeff ", "\ufeff" + good)
    assert [(type(entry), entry.id) for entry in found] == [(Request, "2"), (Request, "4")]


@pytest.mark.parametrize("line", [None, 3, [1], ("a",), object()])
def test_what_is_no_line_at_all_is_a_fault_too(line: Any) -> None:
    assert "must be a JSON object" in _fault(line)


def test_an_open_block_length_follows_the_response() -> None:
    lines = [{"prompt_ids": [1], "gen_length": 4}, {"prompt_ids": [1]}, {"prompt_ids": [1], "block_length": 2}]
    found = parse_requests(
        [*lines, {"prompt_ids": [1], "gen_length": 12}],
        config=_config(),
        tokenizer=None,
        sampling=SamplingConfig(gen_length=16),
        auto_block=8,
    )
    assert [entry.sampling.block_length for entry in found[:3] if isinstance(entry, Request)] == [4, 8, 2]
    assert isinstance(found[3], Result) and "12 and 8" in (found[3].error or "")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
_FIELDS = st.sampled_from(
    ["id", "prompt", "prompt_ids", "messages", "prefix_len", "gen_length", "steps", "block_length", "seed", "n", "x"]
)
_LINES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60),
    _JSON.map(json.dumps),
    st.dictionaries(_FIELDS, _JSON | st.lists(st.integers(-2, 400), max_size=6), max_size=6).map(json.dumps),
    st.dictionaries(_FIELDS, _JSON, max_size=5),
)


@hypothesis.settings(max_examples=250)
@hypothesis.given(st.lists(_LINES, min_size=6, max_size=12), st.booleans())
def test_any_lines_yield_a_request_or_an_error_each(lines: list[Any], with_tokenizer: bool) -> None:
    found = _parse(*lines, tokenizer=_tokenizer() if with_tokenizer else None)
    expected = [line for line in lines if not is_blank(line)]
    assert len(found) == len(expected)
    for entry in found:
        assert isinstance(entry, Request) or (entry.finish_reason == "error" and entry.error)
        if isinstance(entry, Result):
            json.dumps(entry.to_json()).encode()
