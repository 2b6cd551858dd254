"""Requests as they stand in a file, one JSON object a line; a bad line becomes an error result, never an exception."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bicache_jax.core.config import ModelConfig, SamplingConfig
from bicache_jax.core.types import Request, Result, Tokenizer

_PROMPTS = ("prompt", "messages", "prompt_ids")
_SEED_LIMIT = 2**63
_MOST_SAMPLES = 2**16


class _BadRequest(Exception):
    """What is wrong with a line, in one line."""


def parse_requests(
    lines: Iterable[Any],
    *,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    sampling: SamplingConfig,
    source: str = "<input>",
    auto_block: int | None = None,
) -> list[Request | Result]:
    """Parses a request file.

    Args:
        lines: its lines (text or bytes), or objects already read; blank lines count as lines and are skipped, anything
            else is a fault.
        config: architecture of the model the requests are for.
        tokenizer: its tokenizer; without one only `prompt_ids` can be served.
        sampling: settings of a request that names none.
        source: what messages call the file.
        auto_block: where neither a request nor `sampling` was given a block length: the most tokens of a block, which
            is never longer than the response; None: `sampling` holds for all.

    Returns:
        A request, or an error result that names the line and the fault, for each line, in order.
    """
    return list(
        iter_requests(
            lines, config=config, tokenizer=tokenizer, sampling=sampling, source=source, auto_block=auto_block
        )
    )


def iter_requests(
    lines: Iterable[Any],
    *,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    sampling: SamplingConfig,
    source: str = "<input>",
    auto_block: int | None = None,
) -> Iterator[Request | Result]:
    """`parse_requests`, one at a time."""
    seen: set[str] = set()
    index = 0
    for number, line in enumerate(lines, 1):
        if is_blank(line):
            continue
        name = str(number)
        try:
            record = _object(line)
            name = _name(record, number)
            if name in seen:
                repeated, name = name, str(number)
                raise _BadRequest(f"id {repeated!r} stands on an earlier line; give every request an id of its own")
            seen.add(name)
            yield _request(record, name, index, config, tokenizer, _sampling(record, config, sampling, auto_block))
        except _BadRequest as fault:
            message = " ".join(f"{source}, line {number}: {fault}".split())
            yield Result(id=name, finish_reason="error", error=message.encode("utf-8", "replace").decode())
        index += 1


def accepted(answer: Any) -> tuple[str, ...]:
    """Answers that count as right, of a request's `answer` field: one, or a list of them; none if it has none."""
    if answer is None or isinstance(answer, dict):
        return ()
    return tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """The response is one of the answers, white space aside."""
    return text.split() in [answer.split() for answer in answers]


def is_blank(line: Any) -> bool:
    """Whether a line holds nothing, a byte order mark aside."""
    if isinstance(line, bytes):
        return not line.removeprefix(b"\xef\xbb\xbf").strip()
    return isinstance(line, str) and not line.removeprefix("\ufeff").strip()


def _object(line: Any) -> Mapping[str, Any]:
    if not isinstance(line, str | bytes):
        if not isinstance(line, Mapping):
            raise _BadRequest("must be a JSON object")
        return line
    try:
        text = line.decode("utf-8-sig") if isinstance(line, bytes) else line.removeprefix("\ufeff")
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise _BadRequest(f"not valid UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise _BadRequest(f"not valid JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(record, Mapping):
        raise _BadRequest("must be a JSON object")
    return record


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(record: Mapping[str, Any], number: int) -> str:
    value = record.get("id")
    if value is None:
        return str(number)
    if not (isinstance(value, str) or _is_int(value)) or value == "" or (_is_int(value) and abs(value) >= _SEED_LIMIT):
        raise _BadRequest("'id' must be a non-empty string or an integer")
    name = str(value)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _BadRequest("'id' holds a lone surrogate, which no UTF-8 file can") from None
    return name


def _integer(record: Mapping[str, Any], field: str, least: int, below: int) -> int | None:
    value = record.get(field)
    if value is None:
        return None
    if not _is_int(value) or not least <= value < below:
        shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."
        raise _BadRequest(f"{field!r} must be an integer from {least} to {below - 1}, got {shown}")
    return int(value)


def _sampling(
    record: Mapping[str, Any], config: ModelConfig, sampling: SamplingConfig, auto_block: int | None
) -> SamplingConfig:
    limit = config.max_length + 1
    given = {
        "gen_length": _integer(record, "gen_length", 1, limit),
        "steps": _integer(record, "steps", 1, limit),
        "block_length": _integer(record, "block_length", 1, limit),
        "seed": _integer(record, "seed", 0, _SEED_LIMIT),
    }
    if auto_block is not None and given["block_length"] is None:
        given["block_length"] = min(auto_block, given["gen_length"] or sampling.gen_length)
    try:
        return dataclasses.replace(sampling, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValueError as error:
        raise _BadRequest(str(error)) from None


def _tokens(value: Any, config: ModelConfig) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not all(map(_is_int, value)):
        raise _BadRequest("'prompt_ids' must be a list of integers")
    outside = next((token for token in value if not 0 <= token < config.vocab_size), None)
    if outside is not None:
        raise _BadRequest(
            f"'prompt_ids' holds {str(outside)[:40]}, outside the vocabulary (0 to {config.vocab_size - 1})"
        )
    return tuple(map(int, value))


def _text(value: Any, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if not isinstance(value, str):
        raise _BadRequest("'prompt' must be a string")
    if tokenizer is None:
        raise _BadRequest("the model has no tokenizer files; give 'prompt_ids' instead of 'prompt'")
    _encodable(value, "prompt")
    return tokenizer.encode(value)


def _encodable(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadRequest(f"{field!r} holds a lone surrogate, which is not text") from None


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


def _conversation(value: Any, tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], int | None]:
    """Tokens of a conversation, and how many it shares with the template of all but its last user message.

    None where there is no other message: such a request shares what it shares with others, like any prompt.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise _BadRequest('\'messages\' must be a non-empty list of {"role", "content"}')
    for message in value:
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise _BadRequest("every message must be an object with the strings 'role' and 'content'")
        _encodable(message["role"] + message["content"], "messages")
    if tokenizer is None:
        raise _BadRequest("the model has no tokenizer files; give 'prompt_ids' instead of 'messages'")
    try:
        ids = tokenizer.chat_ids(value)
    except ValueError as error:
        raise _BadRequest(str(error)) from None
    user = [place for place, message in enumerate(value) if message["role"] == "user"]
    others = [message for place, message in enumerate(value) if not user or place != user[-1]]
    try:
        return ids, _shared(ids, tokenizer.chat_ids(others, generate=False)) if others else None
    except ValueError:  # a template may insist on a user message
        return ids, None


def _request(
    record: Mapping[str, Any],
    name: str,
    index: int,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    own: SamplingConfig,
) -> Request:
    given = [field for field in _PROMPTS if record.get(field) is not None]
    if len(given) != 1:
        wanted = ", ".join(map(repr, _PROMPTS))
        raise _BadRequest(f"must have exactly one of {wanted}, has {', '.join(given) or 'none'}")
    samples = _integer(record, "n", 1, _MOST_SAMPLES) or 1
    prefix_len: int | None = None
    if given == ["messages"]:
        ids, prefix_len = _conversation(record["messages"], tokenizer)
    elif given == ["prompt"]:
        ids = _text(record["prompt"], tokenizer)
    else:
        ids = _tokens(record["prompt_ids"], config)
    if not ids:
        raise _BadRequest(f"{given[0]!r} has no tokens")
    beyond = max(ids)
    if beyond >= config.vocab_size:
        raise _BadRequest(f"token {beyond} of the tokenizer is outside the model's vocabulary of {config.vocab_size}")
    if len(ids) + own.gen_length > config.max_length:
        raise _BadRequest(
            f"{len(ids)} prompt tokens and gen_length {own.gen_length} exceed the model's {config.max_length} tokens; "
            "shorten the prompt or lower gen_length"
        )
    if samples > 1:
        prefix_len = None  # the whole prompt is what the samples share
    explicit = _integer(record, "prefix_len", 0, len(ids) + 1)
    return Request(name, ids, prefix_len if explicit is None else explicit, own, samples, index)
