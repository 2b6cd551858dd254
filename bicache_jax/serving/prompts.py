"""Prompts as tokens: token ids, a text, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bicache_jax.core.config import ModelConfig
from bicache_jax.core.types import Tokenizer
from bicache_jax.serving.fields import BadRequest, encodable, is_int, shown


def token_prompt(value: Any, config: ModelConfig, field: str = "prompt_ids") -> tuple[int, ...]:
    """A prompt given as token ids: a list, or a one-dimensional array; `field` is what messages call it.

    Raises:
        BadRequest: an entry is not a token of the model.
    """
    ids = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes) or not all(map(is_int, ids)):
        raise BadRequest(f"{field!r} must be a list of integers")
    outside = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if outside is not None:
        raise BadRequest(f"{field!r} holds {str(outside)[:40]}, outside the vocabulary (0 to {config.vocab_size - 1})")
    return tuple(map(int, ids))


def text_prompt(value: Any, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Tokens of a text.

    Raises:
        BadRequest: it is not a string, or there is no tokenizer.
    """
    if not isinstance(value, str):
        raise BadRequest(f"'prompt' must be a string, got {shown(value)}")
    if tokenizer is None:
        raise BadRequest("the model has no tokenizer files; give 'prompt_ids' instead of 'prompt'")
    encodable(value, "prompt")
    return tokenizer.encode(value)


def chat_prompt(value: Any, tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], int | None]:
    """Tokens of a conversation, and how many of them the messages without the last user message also begin with.

    That number is None if there is no other message; the prefix is then detected like that of any prompt.

    Raises:
        BadRequest: it is not a conversation, or the template rejects it.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise BadRequest('\'messages\' must be a non-empty list of {"role", "content"}')
    messages = [_message(message, index) for index, message in enumerate(value)]
    if tokenizer is None:
        raise BadRequest("the model has no tokenizer files; give 'prompt_ids' instead of 'messages'")
    try:
        ids = tokenizer.chat_ids(messages)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    user = [index for index, message in enumerate(messages) if message["role"] == "user"]
    others = [message for index, message in enumerate(messages) if not user or index != user[-1]]
    try:
        return ids, shared_length(ids, tokenizer.chat_ids(others, generate=False)) if others else None
    except ValueError:  # a template may require a user message
        return ids, None


def _message(message: Any, index: int) -> dict[str, Any]:
    """A message with its content as one string; text parts are joined with newlines, as in vLLM."""
    role = message.get("role") if isinstance(message, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "\n".join(_part(part, f"messages[{index}].content[{at}]") for at, part in enumerate(content))
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRequest(
            f"every message must be an object with the strings 'role' and 'content', messages[{index}] is not"
        )
    encodable(role + content, "messages")
    return {**message, "content": content}


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        said = f"a part of type {shown(kind)}" if isinstance(kind, str) else shown(part)
        raise BadRequest(f"{where} is {said}: the model reads parts of type 'text' only")
    if not isinstance(part.get("text"), str):
        raise BadRequest(f"{where} must have a string 'text'")
    return str(part["text"])


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))
