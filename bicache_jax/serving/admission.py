"""What people type, as requests: texts, conversations, token ids, objects and parsed requests, one or many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from bicache_jax.core.config import SamplingConfig
from bicache_jax.core.types import BicacheError, Request, Result
from bicache_jax.serving.fields import SAMPLING, BadRequest, given_sampling, is_int, nearest, shown, with_settings
from bicache_jax.serving.requests import Parsed, Parser, error_result, request_name

Errors = Literal["raise", "return"]
Fault = TypeVar("Fault")
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
    single, entries = entries_of(asked, errors, single=_is_one(asked), forms=_FORMS)

    def name_of(entry: Any, number: int) -> str:
        record = entry if isinstance(entry, Request) else _record(entry)
        return record.id if isinstance(record, Request) else request_name(record, number)

    def parse(entry: Any, name: str, place: int) -> Request:
        if isinstance(entry, Request):
            return dataclasses.replace(parser.checked(entry), index=place)
        return parser.parse(_record(entry), name, place)

    return admit_each(entries, errors, single=single, name_of=name_of, parse=parse, fault=error_result, done=Result)


def entries_of(asked: Any, errors: str, *, single: bool, forms: str) -> tuple[bool, list[Any]]:
    """What was asked, one by one.

    Args:
        asked: one request or an iterable of them.
        errors: as `admit` takes it.
        single: whether it is one.
        forms: what a request may be, for messages.

    Returns:
        `single`, and the requests.

    Raises:
        TypeError: this is neither a request nor a collection of them.
        ValueError: `errors` is none of its values.
    """
    if errors not in ("raise", "return"):
        raise ValueError(f"errors must be 'raise' or 'return', got {errors!r}")
    if not single and (isinstance(asked, str | bytes) or not isinstance(asked, Iterable)):
        raise TypeError(f"requests must be {forms}, or a list of such, got {_what(asked)}")
    return single, [asked] if single else list(asked)


def admit_each(
    entries: Sequence[Any],
    errors: Errors,
    *,
    single: bool,
    name_of: Callable[[Any, int], str],
    parse: Callable[[Any, str, int], Parsed],
    fault: Callable[[str, str], Fault],
    done: type[Fault] | tuple[()] = (),
) -> list[Parsed | Fault]:
    """Makes requests of what was asked, and finds every fault of them.

    Args:
        entries: what was asked, one by one.
        errors: as `admit` takes it.
        single: whether it was one request, and not a list of one.
        name_of: the id of an entry, which is the `number`-th; raises `TypeError` or `BadRequest`.
        parse: the request of an entry, its id and its place; raises likewise.
        fault: what stands in the place of a faulty request, by its id and the message.
        done: what passes through.

    Raises:
        TypeError: with `errors="raise"`, an entry has no form of a request.
        BicacheError: with `errors="raise"`, a request is faulty; the message names the first and counts the others.
    """
    admitted: list[Parsed | Fault] = []
    faults: list[TypeError | BicacheError] = []
    seen: set[str] = set()
    for place, entry in enumerate(entries):
        if isinstance(entry, done):
            admitted.append(entry)
            continue
        where, name = "request" if single else f"requests[{place}]", str(place + 1)
        try:
            name = name_of(entry, place + 1)
            if name in seen:
                raise BadRequest(f"id {name!r} is that of an earlier request; give every request an id of its own")
            seen.add(name)
            admitted.append(parse(entry, name, place))
        except (BadRequest, TypeError) as error:
            message = f"{where}: {error}"
            faults.append(TypeError(message) if isinstance(error, TypeError) else BicacheError(message))
            admitted.append(fault(name, message))
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
