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
from bicache_jax.core.config import CacheConfig, ModelConfig, SamplingConfig
from bicache_jax.core.types import Request, Result
from bicache_jax.serving.fields import KEYS
from bicache_jax.serving.requests import Parser, is_blank

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
    return list(Parser(_config(), tokenizer, settings).lines(lines, source="in.jsonl"))


def _fault(line: Any, tokenizer: Tokenizer | None = None) -> str:
    (result,) = _parse(line, tokenizer=tokenizer)
    assert isinstance(result, Result) and result.finish_reason == "error" and result.error
    assert result.error.startswith("in.jsonl, line 1: ") and "\n" not in result.error
    return result.error


def test_fields_override_flags() -> None:
    line = {"prompt_ids": [1, 2, 3], "prefix_len": 2, "gen_length": 16, "steps": 4, "seed": 9, "n": 2, "answer": "x"}
    (request,) = _parse(json.dumps(line), temperature=0.5)
    assert request == Request("1", (1, 2, 3), 2, SamplingConfig(16, 4, seed=9, temperature=0.5), 2, 0)


def test_every_decoding_setting_may_be_in_a_request() -> None:
    settings: dict[str, Any] = {
        "gen_length": 16, "steps": 4, "block_length": 8, "temperature": 0.7, "remasking": "entropy", "seed": 3,
        "threshold": 0.8, "alg_temperature": 0.2, "top_p": 0.9, "top_k": 5, "cfg_scale": 1, "logits_eos_inf": True,
        "confidence_eos_eot_inf": True, "early_stop": True,
    }  # fmt: skip
    (request,) = _parse(json.dumps({"prompt_ids": [1], **settings, "kind": "x", "metadata": {"a": 1}, "answer": None}))
    assert isinstance(request, Request) and request.sampling == SamplingConfig(**settings)
    others = ("factor", "entropy_bound", "steps_per_block", "suppress_tokens", "editing_threshold")
    assert {*settings, *others} == {field.name for field in dataclasses.fields(SamplingConfig)}
    (by_factor,) = _parse({"prompt_ids": [1], "factor": 2}, threshold=0.8)  # in place of the run's other rule
    assert isinstance(by_factor, Request) and by_factor.sampling == SamplingConfig(8, factor=2.0)
    (by_block,) = _parse({"prompt_ids": [1], "steps_per_block": 3, "suppress_tokens": [4, 5]}, steps=4)
    assert isinstance(by_block, Request)
    assert by_block.sampling == SamplingConfig(8, steps_per_block=3, suppress_tokens=(4, 5))
    for wrong in ("4", [4, "5"], [True], [4, 900]):
        assert "suppress_tokens" in _fault({"prompt_ids": [1], "suppress_tokens": wrong})
    (off,) = _parse({"prompt_ids": [1], "early_stop": False, "top_p": None}, early_stop=True, top_p=0.5)
    assert isinstance(off, Request) and off.sampling == SamplingConfig(8, top_p=0.5)


def test_content_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = _parse(
        {"messages": [{"role": "system", "content": parts}, {"role": "user", "content": parts[:1]}]},
        {
            "messages": [{"role": "system", "content": "a\nb"}, {"role": "user", "content": "a"}],
            "stop": ["d", "c", "d"],
        },
        tokenizer=_tokenizer(),
    )
    first, second = found
    assert isinstance(first, Request) and isinstance(second, Request)
    assert first.prompt_ids == second.prompt_ids and first.chat and first.prefix_from_messages
    assert second.stop == ("d", "c") and first.stop == ()


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
        ({"prompt_ids": [1], "gen_lenght": 8}, "'gen_lenght' is not a key of a request: did you mean 'gen_length'?"),
        ({"prompt_ids": [1], "max_tokens": 8}, "did you mean 'gen_length'?"),
        ({"prompt_ids": [1], "num_samples": 8}, "did you mean 'n'?"),
        ({"prompt_ids": [1], "zzzz": 8}, "known are id, prompt, messages"),
        ({"prompt_ids": [1], "temperature": "hot"}, "'temperature' must be a finite number, got 'hot'"),
        ({"prompt_ids": [1], "temperature": float("nan")}, "finite"),
        ({"prompt_ids": [1], "temperature": 10**400}, "finite"),
        ({"prompt_ids": [1], "temperature": True}, "finite number, got True"),
        ({"prompt_ids": [1], "top_p": 1.5}, "top_p must lie in (0, 1]"),
        ({"prompt_ids": [1], "top_k": 0}, "'top_k' must be an integer"),
        ({"prompt_ids": [1], "early_stop": 1}, "'early_stop' must be true or false, got 1"),
        ({"prompt_ids": [1], "remasking": "best"}, "'remasking' must be one of low_confidence"),
        ({"prompt_ids": [1], "remasking": []}, "'remasking' must be one of"),
        ({"prompt_ids": [1], "threshold": 0.9, "factor": 1.0}, "two rules"),
        ({"prompt_ids": [1], "stop": "a"}, "no tokenizer files"),
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
        ({"messages": [{"role": "user"}]}, "messages[0] is not"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "[0].content[0] is a part of type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0] must have a string 'text'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0] is 'a'"),
        ({"prompt": "a", "stop": 5}, "'stop' must be a string or a list of strings"),
        ({"prompt": "a", "stop": ["a", ""]}, "none of them empty"),
        ({"prompt": "a", "stop": ["a"] * 17}, "at most 16"),
        ('{"prompt": "a", "stop": "\\ud800"}', "surrogate"),
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
    lines = [{"gen_length": 16}, {}, {"block_length": 2}, {"gen_length": 48}]
    lines = [{"prompt_ids": [1]} | line for line in lines]
    config = dataclasses.replace(_config(), max_length=99)
    parser = Parser(config, None, SamplingConfig(gen_length=64), CacheConfig(block_cache="dual"))
    found = list(parser.lines(lines))
    assert [entry.sampling.block_length for entry in found[:3] if isinstance(entry, Request)] == [16, 32, 2]
    assert isinstance(found[3], Result) and "48 and 32" in (found[3].error or "")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
_FIELDS = st.sampled_from([*KEYS, "x", "custom_id", "method", "url", "body"])
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
