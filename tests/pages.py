"""What README and documentation are held to: code that runs, commands that parse, paths and links that exist."""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bicache_jax.cli import build_parser
from bicache_jax.cli.lm_eval import model_arguments

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_OUTPUT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def name_of(page: Path) -> str:
    """The page as tests show it."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run_examples(page: Path) -> list[str]:
    """Runs the Python blocks of a page, one after the other as a reader would; returns what each printed.

    A block of text that follows a block of Python is what it prints, with `...` for what differs.
    """
    said, seen = [], {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    for code, wanted in re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.DOTALL | re.MULTILINE):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, name_of(page), "exec"), seen)
        said.append(out.getvalue())
        if wanted:
            assert doctest.OutputChecker().check_output(wanted, said[-1], _OUTPUT), f"{code}\nprints\n{said[-1]}"
    return said


def commands(page: Path) -> list[list[str]]:
    """The commands in the bash blocks, as words."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class _Parsed(BaseException):
    """Ends a script that has read its arguments."""


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds a command to the parser that would read it, and the files of the repository that it names to be there."""
    match words:
        case ["bicache", *rest]:
            values = vars(build_parser().parse_args(rest))
        case ["python", script, *rest] if script.startswith("scripts/"):
            values = _parsed_by_script(script, rest, monkeypatch)
        case ["python", script] if script.startswith("examples/"):
            values = {"script": script}
        case ["python", "-m", "pytest", *rest]:
            values = {"tests": [word for word in rest if word.startswith("tests/")]}
        case ["python", "-m", "sphinx", *rest]:
            values = {"source": rest[-2]}
            assert (ROOT / rest[-2] / "conf.py").is_file()
        case ["python", "-m", "bicache_jax.lm_eval", *rest]:
            pairs = rest[rest.index("--model_args") + 1].split(",")
            assert model_arguments({name: value for name, _, value in (pair.partition("=") for pair in pairs)})
            values = {"tasks": rest}
        case ["pip", "install", *rest]:
            values = {}
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for wanted in re.findall(r"\.\[([\w,]+)\]", " ".join(rest)):
                assert set(wanted.split(",")) <= set(extras), wanted
        case _:
            raise AssertionError(f"nothing here knows the command {shlex.join(words)}")
    named = [one for value in values.values() for one in (value if isinstance(value, list | tuple) else [value])]
    for one in named:
        if isinstance(one, str) and one.startswith(("examples/", "tests/")):
            assert (ROOT / one).exists(), one


def _parsed_by_script(script: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of a script as its own parser reads them; the script goes no further."""
    found: dict[str, Any] = {}
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        found.update(vars(parse(self, *args, **kwargs)))
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        patch.setattr(sys, "argv", [script, *rest])
        patch.setenv("MALLOC_MMAP_MAX_", "0")  # scripts that train restart themselves to set it
        patch.delattr(os, "execve")
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(_Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return found


def paths(page: Path) -> set[str]:
    """Files and folders of the repository that a page names in backticks."""
    text = page.read_text(encoding="utf-8")
    return set(re.findall(r"`((?!OUTPUT)[\w.]+/[\w./]*|[\w./]+\.(?:py|toml))`", text))


def broken_links(page: Path) -> Iterator[str]:
    """Relative links and included files that are not there."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"\{download\}`[^<`]*<([^>]+)>`", text)
    named += re.findall(r"\{(?:image|include)\} (\S+)", text)
    for link in named:
        if "://" not in link and not (page.parent / link.partition("#")[0]).exists():
            yield link


if __name__ == "__main__":
    run_examples(Path(sys.argv[1]))
