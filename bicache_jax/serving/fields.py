"""Keys and values of a request as the user wrote it: the known keys, and checks of their values."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bicache_jax.core.config import CONFIDENCE_RULES, ModelConfig, SamplingConfig, field_kinds
from bicache_jax.core.types import Tokenizer

PROMPTS = ("prompt", "messages", "prompt_ids", "template", "template_ids")
SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingConfig))
NOTES = ("answer", "kind", "metadata")
"""Keys that do not affect the run: the right answer, the kind of question, and the user's own notes."""
KEYS = ("id", *PROMPTS, "prefix_len", "n", "stop", "trim", *SAMPLING, *NOTES)

# Names that other programs use for our keys.
_ALIASES = {
    "max_tokens": "gen_length",
    "max_new_tokens": "gen_length",
    "max_completion_tokens": "gen_length",
    "max_length": "gen_length",
    "num_samples": "n",
    "num_return_sequences": "n",
    "num_steps": "steps",
    "diffusion_steps": "steps",
    "alg": "remasking",
    "alg_temp": "alg_temperature",
    "confidence_threshold": "threshold",
    "cfg": "cfg_scale",
    "custom_id": "id",
    "text": "prompt",
    "input": "prompt",
    "question": "prompt",
    "token_ids": "prompt_ids",
    "input_ids": "prompt_ids",
    "stop_strings": "stop",
    "infill": "template",
    "masked_ids": "template_ids",
}
# Rules for the same thing. A request that names one of them overrides the run's other ones.
_ALTERNATIVES = (CONFIDENCE_RULES, ("steps", "steps_per_block"))

SEED_LIMIT = 2**63
MOST_SAMPLES = 2**16
MOST_STOPS = 16
_LARGEST = 3.4e38  # of a float32
_INT_LIMIT = 2**31


class BadRequest(Exception):
    """An invalid request; the message is one line."""


def is_int(value: Any) -> bool:
    """Whether a value is an integer, including numpy's integers but not bools."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def nearest(key: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown key: the most similar known key, or all known keys."""
    meant = _ALIASES.get(key)
    if meant not in known:
        meant = next(iter(difflib.get_close_matches(key, known, n=1)), None)
    return f"did you mean {meant!r}?" if meant is not None else f"known are {', '.join(known)}"


def check_keys(record: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
    """Rejects unknown keys.

    Args:
        record: the object.
        known: the keys it may have.
        what: description of the object for messages.

    Raises:
        BadRequest: there is an unknown key.
    """
    for key in record:
        if key not in known:
            raise BadRequest(f"{shown(key)} is not a key of {what}: {nearest(str(key), known)}")


def encodable(text: str, field: str) -> None:
    """Rejects text that cannot be encoded as UTF-8.

    Raises:
        BadRequest: the text contains half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{field!r} holds a lone surrogate, which UTF-8 cannot encode") from None


def integer(record: Mapping[str, Any], field: str, least: int, below: int) -> int | None:
    """An integer field from `least` to `below - 1`; None if it is missing or null.

    Raises:
        BadRequest: the value is something else.
    """
    value = record.get(field)
    if value is None:
        return None
    if not is_int(value) or not least <= value < below:
        raise BadRequest(f"{field!r} must be an integer from {least} to {below - 1}, got {shown(value)}")
    return int(value)


def _number(record: Mapping[str, Any], field: str) -> float | None:
    value = record.get(field)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else float("nan")
    except OverflowError:
        number = float("inf")
    if not abs(number) < _LARGEST:
        raise BadRequest(f"{field!r} must be a finite number, got {shown(value)}")
    return number


def _tokens(record: Mapping[str, Any], field: str) -> tuple[int, ...] | None:
    value = record.get(field)
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(is_int, value)):
        raise BadRequest(f"{field!r} must be a list of token ids, got {shown(value)}")
    return tuple(map(int, value))


def flag(record: Mapping[str, Any], field: str) -> bool | None:
    """A field that is true or false; None if it is missing or null.

    Raises:
        BadRequest: the value is something else.
    """
    value = record.get(field)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{field!r} must be true or false, got {shown(value)}")
    return value


def _choice(record: Mapping[str, Any], field: str, choices: Iterable[Any]) -> Any:
    value = record.get(field)
    if value is not None and (not isinstance(value, str) or value not in choices):
        raise BadRequest(f"{field!r} must be one of {', '.join(choices)}, got {shown(value)}")
    return value


def _words(member: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(member)
    return typing.get_args(member) if origin is typing.Literal else (origin or member,)


@functools.cache
def _kinds() -> dict[str, tuple[Any, ...]]:
    """The types that each decoding setting may have in addition to None; for a choice, its values."""
    kinds = {}
    for name, members in field_kinds(SamplingConfig).items():
        given = (member for member in members if member is not type(None))
        kinds[name] = tuple(word for member in given for word in _words(member))
    return kinds


def given_sampling(record: Mapping[str, Any], config: ModelConfig | None = None) -> dict[str, Any]:
    """The decoding settings that an object contains, by field name of `SamplingConfig`.

    Args:
        record: the object; null counts as not given.
        config: architecture of the model, which limits lengths.

    Raises:
        BadRequest: a value has the wrong type or is out of range.
    """
    length = _INT_LIMIT if config is None else config.max_length + 1
    limits = {"seed": (0, SEED_LIMIT), "top_k": (1, _INT_LIMIT)}
    given: dict[str, Any] = {}
    for name, kinds in _kinds().items():
        if bool in kinds:
            value: Any = flag(record, name)
        elif int in kinds:
            value = integer(record, name, *limits.get(name, (1, length)))
        elif float in kinds:
            value = _number(record, name)
        elif tuple in kinds:
            value = _tokens(record, name)
        else:
            value = _choice(record, name, kinds)
        if value is not None:
            given[name] = value
    return given


def with_settings(sampling: SamplingConfig, given: Mapping[str, Any]) -> SamplingConfig:
    """Replaces some of the settings.

    Raises:
        BadRequest: the settings cannot be combined.
    """
    named = [rules for rules in _ALTERNATIVES if any(rule in given for rule in rules)]
    dropped = {rule: None for rules in named for rule in rules if rule not in given}
    try:
        return dataclasses.replace(sampling, **{**dropped, **given})
    except ValueError as error:
        raise BadRequest(str(error)) from None


def stops(record: Mapping[str, Any], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    """The strings that end a text.

    Raises:
        BadRequest: a value is not a string, or the model has no tokenizer.
    """
    value = record.get("stop")
    if value is None:
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(text, str) and text for text in found):
        raise BadRequest(f"'stop' must be a string or a list of strings, none of them empty, got {shown(value)}")
    if len(found) > MOST_STOPS:
        raise BadRequest(f"'stop' must have at most {MOST_STOPS} strings, got {len(found)}")
    if found and tokenizer is None:
        raise BadRequest("'stop' needs text, but the model has no tokenizer files; leave 'stop' out")
    for text in found:
        encodable(text, "stop")
    return tuple(dict.fromkeys(found))
