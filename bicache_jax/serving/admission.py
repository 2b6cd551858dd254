"""What people type, as requests: texts, conversations, token ids, objects and parsed requests, one or many."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from bicache_jax.core.config import SamplingConfig
from bicache_jax.core.types import BicacheError, Request, Result
from bicache_jax.serving.fields import SAMPLING, BadRequest, given_sampling, is_int, nearest, shown, with_settings
from bicache_jax.serving.requests import Parser, error_result, request_name

Errors = Literal["raise", "return"]
# Wrong types get a message of ours that says where they are, so nothing checks these before it.
if TYPE_CHECKING:
    Message: TypeAlias = Mapping[str, Any]
    One: TypeAlias = str | Mapping[str, Any] | Request | Result | Sequence[Message] | Sequence[int]
    Asked: TypeAlias = One | Iterable[One]
    Settings: TypeAlias = SamplingConfig | Mapping[str, Any] | None
else:
    Asked = Settings = Any

_FORMS = "a text, a list of messages, a list of token ids, a dict or a Request"


def settings(given: Settings, default: SamplingConfig) -> SamplingConfig:
    """The decoding settings of a call.

    Args:
        given: all of them, or some by name, or None.
        default: what holds where none is given.

    Raises:
        TypeError: something else was given.
        ValueError: there is no setting of that name, or values do not go together.
    """
    if given is None:
        return default
    if isinstance(given, SamplingConfig):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(f"sampling must be a SamplingConfig or a dict of its fields, got {_what(given)}")
    for name in given:
        if name not in SAMPLING:
            meant = nearest(str(name), SAMPLING)
            raise ValueError(f"sampling: {shown(name)} is not a field of SamplingConfig: {meant}")
    try:
        return with_settings(default, given_sampling(given))
    except BadRequest as fault:
        raise ValueError(f"sampling: {fault}") from None


def admit(asked: Asked, parser: Parser, *, errors: Errors) -> list[Request | Result]:
    """Turns what was asked into requests, and finds every fault before anything runs.

    Args:
        asked: one request or an iterable of them: texts, conversations (lists of messages), lists of token ids, objects
            as in a request file, parsed requests, in any mixture. A `Result` passes through.
        parser: what makes requests of objects.
        errors: `return` puts an error result in the place of a faulty request, with its id.

    Returns:
        Requests and results in order; a request's index is its position.

    Raises:
        TypeError: this is neither a request nor a collection of them; or, with `errors="raise"`, one of them is not.
        ValueError: `errors` is something else.
        BicacheError: with `errors="raise"`, a request is faulty; the message names the first and counts the others.
    """
    if errors not in ("raise", "return"):
        raise ValueError(f"errors must be 'raise' or 'return', got {errors!r}")
    single = _is_one(asked)
    if not single and (isinstance(asked, bytes) or not isinstance(asked, Iterable)):
        raise TypeError(f"requests must be {_FORMS}, or a list of such, got {_what(asked)}")
    entries: list[Any] = [asked]
    if not single:
        entries = list(cast(Iterable[Any], asked))
    admitted: list[Request | Result] = []
    faults: list[TypeError | BicacheError] = []
    seen: set[str] = set()
    for place, entry in enumerate(entries):
        where, name = "request" if single else f"requests[{place}]", str(place + 1)
        try:
            if isinstance(entry, Result):
                admitted.append(entry)
                continue
            record = entry if isinstance(entry, Request) else _record(entry)
            name = record.id if isinstance(record, Request) else request_name(record, place + 1)
            if name in seen:
                raise BadRequest(f"id {name!r} is that of an earlier request; give every request an id of its own")
            seen.add(name)
            if isinstance(record, Request):
                admitted.append(dataclasses.replace(parser.checked(record), index=place))
            else:
                admitted.append(parser.parse(record, name, place))
        except (BadRequest, TypeError) as fault:
            message = f"{where}: {fault}"
            faults.append(TypeError(message) if isinstance(fault, TypeError) else BicacheError(message))
            admitted.append(error_result(name, message))
    if faults and errors == "raise":
        first, others = faults[0], len(faults) - 1
        more = f" (and {others} more of the {len(entries)} requests {'is' if others == 1 else 'are'} faulty)"
        raise type(first)(f"{first}{more}" if others else str(first))
    return admitted


def _is_one(asked: Any) -> bool:
    """Whether this is one request rather than many: a list is one where it holds messages or tokens."""
    if isinstance(asked, str | Mapping | Request | Result):
        return True
    if hasattr(asked, "tolist"):
        return getattr(asked, "ndim", 0) == 1
    if not isinstance(asked, Sequence) or isinstance(asked, bytes) or not asked:
        return False
    return _is_message(asked[0]) or all(map(is_int, asked))


def _is_message(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "role" in entry


def _record(entry: Any) -> Mapping[str, Any]:
    """A request as an object of a request file.

    Raises:
        TypeError: it has none of the forms of a request.
    """
    if isinstance(entry, Mapping):
        return {"messages": [entry]} if _is_message(entry) else entry
    if isinstance(entry, str):
        return {"prompt": entry}
    if hasattr(entry, "tolist") and getattr(entry, "ndim", 0) == 1:
        return {"prompt_ids": entry}
    if isinstance(entry, Sequence) and not isinstance(entry, bytes):
        return {"prompt_ids" if entry and all(map(is_int, entry)) else "messages": entry}
    raise TypeError(f"a request must be {_FORMS}, got {_what(entry)}")


def _what(value: Any) -> str:
    if value is None:
        return "None"
    return f"{type(value).__name__} {shown(value)}"
