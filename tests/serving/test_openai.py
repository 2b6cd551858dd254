"""OpenAI's batch format: its lines among ours, and results as its batch runners write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import pytest
from fake_run import FakeSession, write_requests
from word_tokenizer import word_tokenizer

from bicache_jax.cli import backend, main
from bicache_jax.core.config import BlockCache, CacheConfig, SamplingConfig
from bicache_jax.core.types import Request, Result, native
from bicache_jax.serving.openai import to_openai
from bicache_jax.serving.requests import Parser

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "system", "content": "w5 w6"}, {"role": "user", "content": "w7"}]


def _parse(*lines: Any, block_cache: BlockCache = "off", **sampling: Any) -> list[Request | Result]:
    config = golden.model("llada")[0]
    tokenizer = word_tokenizer(config.vocab_size)
    settings = SamplingConfig(**({"gen_length": 64} | sampling))
    return list(Parser(config, tokenizer, settings, CacheConfig(block_cache=block_cache)).lines(lines))


def _line(body: dict[str, Any], **more: Any) -> dict[str, Any]:
    url = CHAT if "messages" in body else COMPLETION
    return {"custom_id": "c", "method": "POST", "url": url, "body": body} | more


def _request(body: dict[str, Any], **more: Any) -> Request:
    (found,) = _parse(_line(body), **more)
    assert isinstance(found, Request), found
    return found


def test_lines_of_both_formats_mix() -> None:
    body = {"model": "gpt", "messages": MESSAGES, "max_tokens": 16, "temperature": 0.7, "top_p": 0.9, "seed": 4, "n": 2}
    mine = {"id": "m", "messages": MESSAGES, "gen_length": 16, "temperature": 0.7, "top_p": 0.9, "seed": 4, "n": 2}
    theirs, ours = _parse(json.dumps(_line(body | {"stop": ["w9"], "stream": False})), mine | {"stop": "w9"})
    assert isinstance(theirs, Request) and isinstance(ours, Request) and theirs.id == "c"
    assert (theirs.prompt_ids, theirs.sampling, theirs.n) == (ours.prompt_ids, ours.sampling, ours.n)
    assert theirs.stop == ours.stop == ("w9",) and theirs.chat and ours.chat


@pytest.mark.parametrize(
    ("sampling", "tokens", "canvas", "steps"),
    [
        ({}, 10, 10, None),
        ({"block_length": 16}, 10, 16, None),
        ({"block_length": 16}, 40, 48, None),
        ({"block_cache": "dual"}, 10, 10, None),
        ({"block_cache": "prefix"}, 40, 64, None),
        ({"steps": 32}, 10, 10, 5),  # as many tokens a step as the run has
        ({"steps": 16, "block_length": 16}, 33, 48, 12),
        ({"steps": 4, "block_length": 16}, 100, 112, 7),
    ],
)
def test_max_tokens_takes_the_smallest_canvas(
    sampling: dict[str, Any], tokens: int, canvas: int, steps: int | None
) -> None:
    for key in ("max_tokens", "max_completion_tokens"):
        request = _request({"prompt": "w5", key: tokens}, **sampling)
        assert (request.sampling.gen_length, request.sampling.steps, request.max_tokens) == (canvas, steps, tokens)
    plain = _request({"prompt": "w5"}, **sampling)
    assert plain.sampling.gen_length == 64 and plain.max_tokens is None


def test_a_body_may_have_our_settings_and_what_asks_for_nothing() -> None:
    neutral = {"frequency_penalty": 0.0, "presence_penalty": None, "logprobs": False, "logit_bias": {}, "user": "u"}
    neutral |= {"response_format": {"type": "text"}, "metadata": {"a": 1}, "best_of": 1, "top_k": -1}
    request = _request({"prompt": [5, 6], "steps": 8, "threshold": 0.9, "gen_length": 32, "max_tokens": 20} | neutral)
    assert request.sampling == SamplingConfig(32, 8, threshold=0.9) and request.max_tokens == 20
    assert request.prompt_ids == (5, 6) and not request.chat
    assert _request({"prompt": ["w5 w6"]}).prompt_ids == _request({"prompt": [[5, 6]]}).prompt_ids == (5, 6)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (_line({"messages": MESSAGES, "max_token": 3}), "'max_token' is not a key of the body: did you mean 'max_tok"),
        (_line({"prompt": "w5", "stream": True}), "'stream' of the body is not supported"),
        (_line({"prompt": "w5", "logprobs": 5}), "'logprobs' of the body is not supported, got 5"),
        (_line({"messages": MESSAGES, "tools": [{"type": "function"}]}), "'tools' of the body is not supported"),
        (_line({"messages": MESSAGES, "response_format": {"type": "json_object"}}), "'response_format'"),
        (_line({"prompt": "w5", "max_tokens": 3, "max_completion_tokens": 4}), "differ: give one of them"),
        (_line({"prompt": "w5", "max_tokens": 0}), "'max_tokens' must be an integer"),
        (_line({"prompt": "w5", "max_tokens": 5000}), "'max_tokens' must be an integer from 1 to 1024, got 5000"),
        (_line({"prompt": ["w5", "w6"]}), "put each prompt on its own line"),
        (_line({"prompt": "w5", "temperature": "hot"}), "'temperature' must be a finite number"),
        (_line({"prompt": "w5"}, url=CHAT), "must have 'messages'"),
        (_line({"messages": MESSAGES}, url=COMPLETION), "must have 'prompt'"),
        (_line({"messages": MESSAGES}, url="/v1/embeddings"), "'url' must be /v1/chat/completions"),
        (_line({"messages": MESSAGES}, url=[]), "'url' must be"),
        (_line({"messages": MESSAGES}, method="GET"), "'method' must be 'POST'"),
        (_line({"messages": MESSAGES}, extra=1), "'extra' is not a key of a line of a batch file"),
        ({"custom_id": "c", "url": CHAT, "body": []}, "'body' must be an object"),
        ({"custom_id": "c", "url": CHAT}, "'body' must be an object"),
        ({"url": CHAT, "body": {"messages": MESSAGES}}, "must have a 'custom_id'"),
        (
            _line({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            "messages[0].content[0] is a part of type 'image_url'",
        ),
    ],
)
def test_faults_of_a_line_name_what_is_wrong(line: dict[str, Any], word: str) -> None:
    (result,) = _parse(line)
    assert isinstance(result, Result) and word in str(result.error)
    assert result.id == ("c" if "custom_id" in line else "1")


def _record(name: str, sample: int = 0, **more: Any) -> dict[str, Any]:
    result = Result(name, sample, (5, 6, 7), "w5 w6", "stop", steps=3, prompt_len=9, text_len=2)
    return result.to_record() | {"created": 17 + sample} | more


def test_results_become_one_line_a_request() -> None:
    failed = Result("bad", finish_reason="error", error="line 3: bad").to_record()
    broken = Result("late", finish_reason="error", error="not finite", engine_fault=True).to_record()
    samples = [_record("a", chat=True), _record("a", 1, chat=True, finish_reason="length")]
    records = [*samples, failed, _record("b"), broken]
    lines = list(to_openai(records, model="m"))
    assert [line["custom_id"] for line in lines if line] == ["a", "bad", "b", "late"]
    chat, bad, text, late = (line for line in lines if line)
    assert list(chat) == ["id", "custom_id", "response", "error"] and chat["error"] is None
    assert chat["response"]["status_code"] == 200 and len({line["id"] for line in lines if line}) == 4
    assert chat["response"]["body"] | {"id": ""} == {
        "id": "",
        "object": "chat.completion",
        "created": 18,
        "model": "m",
        "choices": [
            {"index": i, "message": {"role": "assistant", "content": "w5 w6"}, "logprobs": None, "finish_reason": why}
            for i, why in enumerate(("stop", "length"))
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }
    body = text["response"]["body"]
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == "w5 w6"
    assert bad["response"]["status_code"] == 400 and bad["error"]["message"] == "line 3: bad"
    assert bad["response"]["body"] == {"error": bad["error"]} and bad["error"]["type"] == "invalid_request_error"
    assert late["response"]["status_code"] == 500 and late["error"]["type"] == "server_error"
    assert failed.keys() == broken.keys() - {"engine_fault"} and native(broken).keys() == native(failed).keys()


def test_a_line_is_there_when_all_its_samples_are() -> None:
    records = [None, _record("a"), None, _record("a", 1), None, _record("a", 0), None]
    lines = [line and len(line["response"]["body"]["choices"]) for line in to_openai(records, model="m")]
    assert lines == [None, None, None, 2, None, 1]  # the same name, asked again, is another request


def test_the_command_writes_both_formats(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    monkeypatch.setattr(backend, "open_session", FakeSession)
    monkeypatch.chdir(tmp_path)
    write_requests(tmp_path / "in.jsonl", 4, n=2)
    flags = ["generate", "--model", "fake", "--input", "in.jsonl", "--quiet"]
    assert main([*flags, "--output", "native.jsonl"]) == 0
    assert main([*flags, "--output", "openai.jsonl", "--output-format", "openai"]) == 0
    assert main([*flags, "--output-format", "openai"]) == 0
    own = [json.loads(line) for line in Path("native.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in Path("openai.jsonl").read_text().splitlines()]
    streamed = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    for line in [*lines, *streamed]:
        line["response"]["body"]["created"] = 0
    unseen = {"prompt_len": 0, "text_len": 0, "created": 0}
    records = [line | unseen for line in own]
    assert lines == streamed == list(to_openai(records, model="fake"))
    assert [len(line["response"]["body"]["choices"]) for line in lines] == [2, 3, 2, 3]
