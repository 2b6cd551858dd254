"""What lm-evaluation-harness asks for, as requests of this library; nothing here imports it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bicache_jax.core.types import BicacheError
from bicache_jax.serving.fields import MOST_STOPS

USUAL_LENGTH = 256
"""Response tokens where neither the task nor the user says how many, as in the harness's own models."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_IGNORED = ("do_sample", "until", *_LENGTHS, "max_length")
_PASSED = ("temperature", "top_p", "top_k", "seed")


def name_of(*parts: Any) -> str:
    """A name that follows from what is asked: what is drawn for it is the same in every run, and a journal finds it."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=True, default=str).encode(), digest_size=12).hexdigest()


def stops_of(arguments: Mapping[str, Any]) -> list[str]:
    """The strings that end an answer."""
    until = arguments.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of some strings."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def settings_of(arguments: Mapping[str, Any], gen_length: int | None) -> dict[str, Any]:
    """A task's arguments of generation as the fields of a request.

    Args:
        arguments: `until`, `max_gen_toks`, `do_sample`, `temperature` and others, as tasks have them.
        gen_length: response tokens, whatever the task asks for; None: what it asks for.

    Returns:
        Fields; the temperature is 0 unless the task samples. A warning names arguments that mean nothing here.

    Raises:
        BicacheError: the length that the task asks for is not a number of tokens.
    """
    unknown = [name for name in arguments if name not in (*_IGNORED, *_PASSED)]
    if unknown:
        warnings.warn(f"generation arguments that mean nothing here: {', '.join(unknown)}", UserWarning, stacklevel=2)
    name = next((name for name in _LENGTHS if arguments.get(name) is not None), None)
    asked = USUAL_LENGTH if name is None else arguments[name]
    if gen_length is None and (isinstance(asked, bool) or not isinstance(asked, int) or asked < 1):
        raise BicacheError(f"generation argument {name} must be an integer of at least 1, got {asked!r}")
    fields: dict[str, Any] = {"gen_length": gen_length or asked}
    fields |= {name: arguments[name] for name in _PASSED if arguments.get(name) is not None}
    sampled = arguments.get("do_sample")
    if sampled is False or (sampled is None and "temperature" not in arguments):
        fields.pop("temperature", None)
    elif sampled and "temperature" not in arguments:
        fields["temperature"] = 1.0
    if stops := stops_of(arguments):
        fields["stop"] = stops[:MOST_STOPS]
    return fields


def windows(tokens: Sequence[int], prefix: int, most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts a text into windows: each token is predicted once, behind what its window has room for.

    As `get_rolling_token_windows` of the harness with a context of one token: the first window is behind the prefix
    token, the others behind the token before them, and the last one behind as many as fill it.

    Args:
        tokens: the text.
        prefix: what the first token is predicted behind.
        most: tokens of a window, what comes before it included.

    Yields:
        What comes before a window, and its tokens.

    Raises:
        BicacheError: there is no room for a token.
    """
    room = most - 1
    if room < 1:
        raise BicacheError(f"max_length must be at least 2, got {most}")
    for begin in range(0, len(tokens), room):
        own = tuple(tokens[begin : begin + room])
        context = tuple(tokens[max(0, begin + len(own) - most) : begin]) if begin else (prefix,)
        yield context, own
