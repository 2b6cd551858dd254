"""Requests of a file, one JSON object a line; a bad line becomes an error result, never an exception."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from bicache_jax.core.config import CacheConfig, ModelConfig, SamplingConfig
from bicache_jax.core.types import BicacheError, Request, Result, Tokenizer
from bicache_jax.serving.fields import (
    KEYS,
    MOST_SAMPLES,
    PROMPTS,
    SEED_LIMIT,
    BadRequest,
    check_keys,
    encodable,
    flag,
    given_sampling,
    integer,
    is_int,
    stops,
    with_settings,
)
from bicache_jax.serving.inputs import is_blank
from bicache_jax.serving.openai import from_openai, is_openai
from bicache_jax.serving.prompts import chat_prompt, text_prompt, token_prompt
from bicache_jax.serving.templates import Template, text_template, token_template

Parsed = TypeVar("Parsed")


@dataclasses.dataclass(frozen=True)
class Parser:
    """Makes requests of objects.

    Attributes:
        config: architecture of the model the requests are for.
        tokenizer: its tokenizer; without one only `prompt_ids` can be served.
        sampling: settings of a request that names none.
        cache: how prefixes are reused; a block cache implies a block length.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    sampling: SamplingConfig
    cache: CacheConfig = CacheConfig()

    def parse(self, record: Mapping[str, Any], name: str, index: int) -> Request:
        """The request that an object describes, in our own form or as a line of OpenAI's batch format.

        Args:
            record: the object.
            name: id of the request.
            index: its place in the input.

        Raises:
            BadRequest: it describes none.
        """
        max_tokens = None
        if is_openai(record):
            record, max_tokens = from_openai(record, self.sampling, self.cache, self.config)
        check_keys(record, KEYS, "a request")
        config = self.config
        given = [field for field in PROMPTS if record.get(field) is not None]
        if len(given) != 1:
            raise BadRequest(f"must have exactly one of {', '.join(map(repr, PROMPTS))}, has {_listed(given)}")
        sampling = with_settings(self.sampling, given_sampling(record, config))
        samples = integer(record, "n", 1, MOST_SAMPLES) or 1
        template, prefix_len = self._prompt(given[0], record[given[0]])
        if not template.known:
            raise BadRequest(f"{given[0]!r} has no tokens" + (" beside its holes" if template.holes else ""))
        if template.holes and record.get("gen_length") is not None:
            raise BadRequest("a template takes no 'gen_length': its holes say how many tokens they have")
        if not template.holes and record.get("trim") is not None:
            raise BadRequest("'trim' is for templates: other texts end at an end of text anyway")
        lead = template.holes[0][0] if template.holes else len(template.known)
        explicit = integer(record, "prefix_len", 0, lead + 1)
        if explicit is None and samples > 1:
            prefix_len = None  # the whole prompt is what the samples share
        request = Request(
            id=name,
            prompt_ids=template.known,
            prefix_len=prefix_len if explicit is None else explicit,
            sampling=sampling,
            n=samples,
            index=index,
            stop=stops(record, self.tokenizer),
            max_tokens=max_tokens,
            chat=given == ["messages"],
            prefix_from_messages=explicit is None and prefix_len is not None,
            holes=template.holes,
            trim=bool(flag(record, "trim")),
            template=template.texts,
        )
        return self.checked(request)

    def _prompt(self, field: str, value: Any) -> tuple[Template, int | None]:
        """The tokens of a request, with holes or without, and what of them its messages say to be the prefix.

        Raises:
            BadRequest: the value has no tokens, or not of this model.
        """
        if field == "template":
            return text_template(value, self.tokenizer, self.config), None
        if field == "template_ids":
            return token_template(token_prompt(value, self.config, field), self.config), None
        if field == "messages":
            value, last = _without_template(value)
            ids, prefix_len = chat_prompt(value, self.tokenizer)
            if last is None:
                return Template(ids, ()), prefix_len
            name = "messages[-1].template"
            return text_template(last, self.tokenizer, self.config, alone=False, field=name).behind(ids), prefix_len
        ids = text_prompt(value, self.tokenizer) if field == "prompt" else token_prompt(value, self.config)
        return Template(ids, ()), None

    def checked(self, request: Request) -> Request:
        """A request as it is run, with the block length that the block cache implies.

        Raises:
            BadRequest: its lengths do not go together, or its tokens, its length, its prefix or its stops do not fit
                the model.
        """
        ids, config, gen_length = request.prompt_ids, self.config, request.sampling.gen_length
        if not ids:
            raise BadRequest("the prompt has no tokens")
        _check_holes(request, config)
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            outside = max(ids) if max(ids) >= config.vocab_size else min(ids)
            raise BadRequest(f"token {outside} of the prompt is outside the model's vocabulary of {config.vocab_size}")
        if len(ids) + gen_length > config.max_length and request.holes:
            raise BadRequest(
                f"the template's {len(ids) + gen_length} tokens, those of its holes included, exceed the model's "
                f"{config.max_length}: shorten it"
            )
        if len(ids) + gen_length > config.max_length:
            raise BadRequest(
                f"{len(ids)} prompt tokens and gen_length {gen_length} exceed the model's {config.max_length} tokens; "
                "shorten the prompt or lower gen_length"
            )
        integer({"prefix_len": request.prefix_len}, "prefix_len", 0, request.lead + 1)
        integer({"n": request.n}, "n", 1, MOST_SAMPLES)
        for token in request.sampling.suppress_tokens:
            if not 0 <= token < config.vocab_size:
                raise BadRequest(f"suppress_tokens: {token} is outside the model's vocabulary of {config.vocab_size}")
        if request.stop:
            stops({"stop": request.stop}, self.tokenizer)
        try:
            sampling = self.cache.with_blocks(request.sampling, config, even=not request.holes)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        return request if sampling is request.sampling else dataclasses.replace(request, sampling=sampling)

    def lines(self, lines: Iterable[Any], source: str = "<input>") -> Iterator[Request | Result]:
        """Parses the lines of a request file one by one.

        Args:
            lines: text or bytes, or objects already read; blank lines count as lines and are skipped, anything else is
                a fault.
            source: what messages call the file.

        Returns:
            An iterator: a request, or an error result that names the line and the fault, for each line, in order.
        """
        return parsed_lines(lines, source, self.parse)

    def requests(self, lines: Iterable[Any], source: str = "<input>") -> list[Request]:
        """The requests of a file that must not have a bad line; arguments as `lines`.

        Raises:
            BicacheError: it has one; the message is the first's.
        """
        found = []
        for entry in self.lines(lines, source):
            if isinstance(entry, Result):
                raise BicacheError(entry.error)
            found.append(entry)
        return found


def parsed_lines(
    lines: Iterable[Any], source: str, parse: Callable[[Mapping[str, Any], str, int], Parsed]
) -> Iterator[Parsed | Result]:
    """Parses the lines of a file one by one; see `Parser.lines`.

    Args:
        lines: the lines.
        source: what messages call the file.
        parse: makes a request of an object, its name and its place in the input; raises `BadRequest`.
    """
    seen: set[str] = set()
    index = 0
    for number, line in enumerate(lines, 1):
        if is_blank(line):
            continue
        name = str(number)
        try:
            record = json_object(line)
            name = request_name(record, number)
            if name in seen:
                repeated, name = name, str(number)
                raise BadRequest(f"id {repeated!r} is that of an earlier line; give every request its own id")
            seen.add(name)
            yield parse(record, name, index)
        except BadRequest as fault:
            yield error_result(name, f"{source}, line {number}: {fault}")
        index += 1


def error_result(name: str, message: str) -> Result:
    """What a request gets that cannot run: its fault, in one line that any file can hold."""
    return Result(id=name, finish_reason="error", error=" ".join(message.split()).encode("utf-8", "replace").decode())


def request_name(record: Mapping[str, Any], number: int) -> str:
    """The id of a request: its own, or its number in the input.

    Raises:
        BadRequest: it is neither a string nor an integer.
    """
    field = "custom_id" if is_openai(record) else "id"
    value = record.get(field)
    if value is None:
        return str(number)
    if not (isinstance(value, str) or is_int(value)) or value == "" or (is_int(value) and abs(value) >= SEED_LIMIT):
        raise BadRequest(f"{field!r} must be a non-empty string or an integer")
    name = str(value)
    encodable(name, field)
    return name


def _without_template(messages: Any) -> tuple[Any, Any]:
    """A conversation without the template of the answer that it ends with, and that template, if there is one.

    Raises:
        BadRequest: the message with the template is not the assistant's, or has a content, too.
    """
    last = messages[-1] if isinstance(messages, Sequence) and not isinstance(messages, str | bytes) and messages else {}
    if not isinstance(last, Mapping) or "template" not in last:
        return messages, None
    if last.get("role") != "assistant" or last.keys() != {"role", "template"}:
        raise BadRequest(
            'a message with a template must be the last one, {"role": "assistant", "template": ...}, without content'
        )
    return messages[:-1], last["template"]


def _check_holes(request: Request, config: ModelConfig) -> None:
    """Refuses holes that are not apart from each other in the sequence, or that the model cannot fill.

    Raises:
        BadRequest: they are not, or it cannot.
    """
    if not request.holes:
        if request.trim or request.template:
            raise BadRequest("trim and template are for requests with holes")
        return
    total, end = len(request.prompt_ids) + request.sampling.gen_length, 0
    for place, length in request.holes:
        if length < 1 or not end <= place <= total - length:
            raise BadRequest(
                f"holes must be in order, apart from each other, of at least 1 token and within the {total} tokens of "
                f"the sequence, got position {place} and length {length}"
            )
        end = place + length
    if request.template and len(request.template) != len(request.holes) + 1:
        raise BadRequest(f"template must have {len(request.holes) + 1} texts, got {len(request.template)}")
    if request.max_tokens is not None:
        raise BadRequest("a template takes no max_tokens: its holes say how many tokens they have")
    if config.block_causal and request.lead < len(request.prompt_ids):
        raise BadRequest(
            "this model's attention is block-causal, so a hole does not see the text behind it: a template may have "
            "one hole, at its end"
        )


def json_object(line: Any) -> Mapping[str, Any]:
    """The JSON object on a line of text or bytes, or one that was read already.

    Raises:
        BadRequest: the line holds something else.
    """
    if not isinstance(line, str | bytes):
        if not isinstance(line, Mapping):
            raise BadRequest("must be a JSON object")
        return line
    try:
        text = line.decode("utf-8-sig") if isinstance(line, bytes) else line.removeprefix("\ufeff")
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise BadRequest(f"not valid UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not valid JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(record, Mapping):
        raise BadRequest("must be a JSON object")
    return record


def _listed(given: Sequence[str]) -> str:
    return ", ".join(given) or "none"
