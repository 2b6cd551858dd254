"""The directive `commands`: what `bicache COMMAND --help` says, from the parsers themselves."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator

from bicache_jax.cli import COMMANDS, build_parser
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

WIDTH = 100


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by name."""
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


class Commands(SphinxDirective):
    """All commands, a section each."""

    def run(self) -> list[nodes.Node]:
        """Makes the nodes."""
        parsers = subparsers(build_parser())
        return [node for name in COMMANDS for node in self.parse_text_to_nodes("\n".join(_markdown(name, parsers[name])), allow_section_headings=True)]


class CommandDescription(SphinxDirective):
    """The description of one command: with what format requests are written, for example."""

    required_arguments = 1
    option_spec = {"epilog": directives.flag}

    def run(self) -> list[nodes.Node]:
        """Makes the nodes."""
        module = COMMANDS[self.arguments[0]]
        text = module.EPILOG if "epilog" in self.options else module.DESCRIPTION
        return [nodes.literal_block(text, text, language="text")]


def _markdown(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """The section of a command, as Markdown."""
    program = f"bicache {name}"
    yield f"## {program}\n"
    yield from _literal(parser.description or "")
    yield f"```{{program}} {program}\n```\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        yield f"**{group.title}**" + (f": {_escape(group.description)}" if group.description else "") + "\n"
        for action in actions:
            yield from _option(parser, action)
    yield from _literal(parser.epilog or "")


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    formatter = parser._get_formatter()
    takes = "" if action.nargs == 0 else " " + formatter._format_args(action, _metavar(action))
    spelled = ", ".join(f"{flag}{takes}" for flag in action.option_strings) or action.dest
    text = formatter._expand_help(action) if action.help else ""
    yield f"````{{option}} {spelled}\n{_escape(text)}\n````\n"


def _metavar(action: argparse.Action) -> str:
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _escape(text: str) -> str:
    """Help is plain text: nothing in it is Markdown."""
    return "".join(f"\\{mark}" if mark in "\\`*_{}[]<>#$~|" else mark for mark in text)


def _literal(text: str) -> Iterator[str]:
    text = textwrap.dedent(text).strip("\n")
    if text:
        yield f"`````text\n{text}\n`````\n"


def setup(app):
    """Registers the directives."""
    app.add_directive("commands", Commands)
    app.add_directive("command-text", CommandDescription)
    return {"parallel_read_safe": True}
