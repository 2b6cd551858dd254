"""OpenAI's batch format: its request lines as ours, and our results as its result lines. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bicache_jax.core.config import CacheConfig, ModelConfig, SamplingConfig
from bicache_jax.core.types import Record
from bicache_jax.serving.fields import SAMPLING, BadRequest, check_keys, integer, is_int, shown

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
_LINE = ("custom_id", "method", "url", "body")
_LENGTHS = ("max_tokens", "max_completion_tokens")
_PASSED = ("n", "stop", "prefix_len", *SAMPLING)
_IGNORED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Keys that do not change an answer. `model` is one of them, since there is only one model."""
# What the engine cannot do, with the values that do not ask for it (null is always one).
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
_BODY = ("messages", "prompt", *_LENGTHS, *_PASSED, *_IGNORED, *_UNSUPPORTED)

_BAD_REQUEST, _FAILED = (400, "invalid_request_error"), (500, "server_error")


def is_openai(record: Mapping[str, Any]) -> bool:
    """Whether an object is a line of OpenAI's batch format rather than a request of ours."""
    return "body" in record or ("custom_id" in record and "url" in record)


def from_openai(
    record: Mapping[str, Any], sampling: SamplingConfig, cache: CacheConfig, config: ModelConfig
) -> tuple[dict[str, Any], int | None]:
    """A line of a batch file as a request of ours.

    `max_tokens` becomes the smallest canvas that holds as many tokens in whole blocks, and the text ends after
    `max_tokens`. Steps keep the pace of `sampling`, tokens per step. The body may also have any decoding setting of
    ours, as clients send them with `extra_body`.

    Args:
        record: the line.
        sampling: settings of a request that names none.
        cache: how prefixes are reused; a block cache implies a block length.
        config: the model: its longest sequence, and its blocks.

    Returns:
        The request, and the most tokens of its text (None: as many as the canvas has).

    Raises:
        BadRequest: the line does not ask for a completion, or asks for something that is not supported.
    """
    check_keys(record, _LINE, "a line of a batch file")
    body = record.get("body")
    if not isinstance(body, Mapping):
        raise BadRequest(f"'body' must be an object, got {shown(body)}")
    if not record.get("custom_id"):
        raise BadRequest("a line of a batch file must have a 'custom_id'")
    if record.get("method", "POST") != "POST":
        raise BadRequest(f"'method' must be 'POST', got {shown(record['method'])}")
    check_keys(body, _BODY, "the body")
    for key, harmless in _UNSUPPORTED.items():
        value = body.get(key)
        if value is not None and value not in harmless:
            raise BadRequest(f"{key!r} of the body is not supported, got {shown(value)}: leave it out")
    native = {"id": record["custom_id"], **_prompt(record, body)}
    native |= {key: body[key] for key in _PASSED if body.get(key) is not None}
    if native.get("top_k") == -1:  # vLLM's word for all
        del native["top_k"]
    lengths = {key: found for key in _LENGTHS if (found := integer(body, key, 1, config.max_length + 1)) is not None}
    if len(set(lengths.values())) > 1:
        raise BadRequest("'max_tokens' and 'max_completion_tokens' differ: give one of them")
    max_tokens = next(iter(lengths.values()), None)
    if max_tokens is not None and "gen_length" not in native:
        native |= _canvas(max_tokens, native, sampling, cache, config)
    return native, max_tokens


def _prompt(record: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    wanted = "messages" if body.get("messages") is not None else "prompt"
    url = record.get("url", CHAT if wanted == "messages" else COMPLETION)
    if url not in (CHAT, COMPLETION):
        raise BadRequest(f"'url' must be {CHAT} or {COMPLETION}, got {shown(url)}")
    if (url == CHAT) != (wanted == "messages") or body.get(wanted) is None:
        raise BadRequest(f"the body of {url} must have {'messages' if url == CHAT else 'prompt'!r}")
    value = body[wanted]
    if wanted == "messages":
        return {"messages": value}
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1 and not is_int(value[0]):
        value = value[0]
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, Sequence) or not all(map(is_int, value)):
        raise BadRequest("'prompt' of the body must be a string or a list of tokens: put each prompt on its own line")
    return {"prompt_ids": value}


def _canvas(
    max_tokens: int, native: Mapping[str, Any], sampling: SamplingConfig, cache: CacheConfig, config: ModelConfig
) -> dict[str, int]:
    """Canvas and steps for so many tokens of text."""
    block = integer(native, "block_length", 1, 2**31) or sampling.block_length
    block = block or cache.default_block(max_tokens, config)
    blocks = -(-max_tokens // block)
    found = {"gen_length": blocks * block}
    if sampling.steps is not None and "steps" not in native:
        steps = max(1, round(sampling.steps * blocks * block / sampling.gen_length))
        found["steps"] = -(-steps // blocks) * blocks
    return found


def to_openai(records: Iterable[Record | None], *, model: str) -> Iterator[Record | None]:
    """Results as lines of OpenAI's batch output: one a request, its samples as `choices`.

    Args:
        records: results in input order, the samples of a request one after the other; None where the next one is not
            there yet, which is passed on. Each answer has `created`, the time at which it came (seconds since 1970).
        model: what the model is called.

    Yields:
        `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`, each when all its samples are
        there. Where a sample is an error, `error` and a body with an error object take the place of the answer.
    """
    group: list[Record] = []
    for record in records:
        if record is None:
            yield None
            continue
        if group and (record["id"] != group[0]["id"] or record["sample"] == 0):
            yield _line(group, model)
            group = []
        group.append(record)
    if group:
        yield _line(group, model)


def _line(group: Sequence[Record], model: str) -> Record:
    name = group[0]["id"]
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:24]  # a second run names them the same
    failed = next((record for record in group if record["finish_reason"] == "error"), None)
    status, error = 200, None
    if failed is None:
        body = _answer(group, digest, model)
    else:
        status, kind = _FAILED if failed.get("engine_fault") else _BAD_REQUEST
        error = {"message": failed["error"], "type": kind, "param": None, "code": kind}
        body = {"error": error}
    response = {"status_code": status, "request_id": f"req_{digest}", "body": body}
    return {"id": f"batch_req_{digest}", "custom_id": name, "response": response, "error": error}


def _answer(group: Sequence[Record], digest: str, model: str) -> Record:
    chat = bool(group[0].get("chat"))
    choices = []
    for record in group:
        text = record["text"] if record["text"] is not None else ""
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices.append({"index": record["sample"], **said, "logprobs": None, "finish_reason": record["finish_reason"]})
    asked, written = group[0]["prompt_len"], sum(record["text_len"] for record in group)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if chat else "text_completion",
        "created": max(record["created"] for record in group),
        "model": model,
        "choices": choices,
        "usage": {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written},
    }
