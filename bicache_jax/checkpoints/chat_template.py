"""Chat templates: renders a checkpoint's jinja source in jinja2's sandbox, in the same way as `transformers`."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(
    template: str, messages: Sequence[Mapping[str, Any]], special: Mapping[str, str], *, generate: bool = True
) -> str:
    """The text of a conversation.

    Args:
        template: jinja source.
        messages: the conversation.
        special: special tokens that the template may refer to (`bos_token`, ...).
        generate: end with the start of the assistant's answer.

    Raises:
        ValueError: the template refuses the messages, or fails on them.
    """
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=generate,
                tools=None,  # templates test it against None, and an undefined name is not None
                documents=None,
                **special,
            )
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    except Exception as error:  # the template comes from the checkpoint and may fail in any way
        raise ValueError(f"the chat template fails on the messages: {type(error).__name__}: {error}") from None


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training; in a prompt it has no effect."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Returns the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def dump(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = dump
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment
