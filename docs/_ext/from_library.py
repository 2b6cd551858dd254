"""Directives that take text from the library when the site is built, so that nothing is copied by hand.

- `commands`: what `bicache COMMAND --help` says, from the parsers, with a target for each flag.
- `command-text NAME`: a command's description, or its epilog.
- `fields CLASS`: the `Attributes:` of a class, as a list.
- `module-text MODULE`: the docstring of a module, as it stands.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bicache_jax.cli import COMMANDS, build_parser


class Commands(SphinxDirective):
    """All commands, a section each."""

    def run(self) -> list[nodes.Node]:
        """Makes the nodes."""
        text = "\n".join(line for name, parser in subparsers(build_parser()).items() for line in _section(name, parser))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class CommandText(SphinxDirective):
    """The description of one command, which says how requests are written, for example."""

    required_arguments = 1
    option_spec = {"epilog": directives.flag}

    def run(self) -> list[nodes.Node]:
        """Makes the nodes."""
        module = COMMANDS[self.arguments[0]]
        if "epilog" in self.options:
            return _as_it_stands(module.EPILOG, wrap=False)
        return _as_it_stands(module.DESCRIPTION)


class ModuleText(SphinxDirective):
    """The docstring of a module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Makes the nodes."""
        return _as_it_stands(inspect.getdoc(importlib.import_module(self.arguments[0])) or "", wrap=False)


class FieldList(SphinxDirective):
    """The attributes of a class, by its docstring."""

    required_arguments = 1
    option_spec = {"only": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Makes the nodes."""
        module, _, name = self.arguments[0].rpartition(".")
        found = attributes(getattr(importlib.import_module(module), name))
        names = self.options["only"].split() if "only" in self.options else list(found)
        return self.parse_text_to_nodes("\n".join(f"- `{name}`: {found[name]}" for name in names))


def attributes(documented: type[Any]) -> dict[str, str]:
    """The text of each attribute in a class's docstring.

    Raises:
        KeyError: the docstring has no attributes.
    """
    sections = re.split(r"^(\w+):\n", inspect.getdoc(documented) or "", flags=re.MULTILINE)
    body = dict(zip(sections[1::2], sections[2::2], strict=True))["Attributes"]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", body, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by name."""
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def _section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """The section of a command, as Markdown."""
    program = f"bicache {name}"
    yield f"## {program}\n"
    yield from _literal(parser.description or "")
    yield f"```{{program}} {program}\n```\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            yield f"**{group.title}**" + (f": {_escape(group.description)}" if group.description else "") + "\n"
        for action in actions:
            yield from _option(parser, action)
    yield from _literal(parser.epilog or "", wrap=False)


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    formatter = parser._get_formatter()
    words = "|".join(map(str, action.choices)) if action.choices else action.dest.upper()
    takes = "" if action.nargs == 0 else " " + formatter._format_args(action, words)
    spelled = ", ".join(f"{flag}{takes}" for flag in action.option_strings) or action.dest
    text = formatter._expand_help(action) if action.help else ""
    yield f"````{{option}} {spelled}\n{_escape(text)}\n````\n"


def _escape(text: str) -> str:
    """Help is plain text: nothing in it is Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#$~|])", r"\\\1", text)


def _literal(text: str, *, wrap: bool = True) -> Iterator[str]:
    text = textwrap.dedent(text).strip("\n")
    if text:
        yield "`````{code-block} text\n" + ":class: prose\n" * wrap + f"\n{text}\n`````\n"


def _as_it_stands(text: str, *, wrap: bool = True) -> list[nodes.Node]:
    return [nodes.literal_block(text, text, language="text", classes=["prose"] * wrap)]


def _dashes(app: Sphinx, tree: nodes.document) -> None:
    """The dash between a parameter and its text, which Sphinx leaves to smart quotes: with these, flags lose one."""
    for node in list(tree.findall(nodes.Text)):
        if node == " -- ":
            node.parent.replace(node, nodes.Text(" – "))


def _letters(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """An attribute that is explained by one letter, such as `L.`, is no numbered list."""
    lines[:] = [re.sub(r"^(:\w+ \w+: )([A-Z]\.)", r"\1\\\2", line) for line in lines]


def _files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes links to Markdown files beside the site downloads; as they are written, they work in the repository."""
    source[0] = re.sub(r"\]\((?=\.\./\.\./[^)]*\.md\))", "](path:", source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directives."""
    app.connect("source-read", _files)
    app.connect("doctree-read", _dashes)
    app.connect("autodoc-process-docstring", _letters, priority=900)  # after napoleon
    app.add_directive("commands", Commands)
    app.add_directive("command-text", CommandText)
    app.add_directive("fields", FieldList)
    app.add_directive("module-text", ModuleText)
    return {"parallel_read_safe": True}
