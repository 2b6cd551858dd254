"""The documentation: it builds without a warning, its code runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pages
import pytest
from pages import DOCS, PAGES, ROOT

import bicache_jax
from bicache_jax.cli import COMMANDS, build_parser

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="an unpacked sdist without documentation")

# What the README showed and CI ran before there was a site. The other pages compile more than CI has time for.
QUICK = ("docs/how-to/keep-prefixes.md", "docs/how-to/serve.md")
EXTRA = ("sphinx", "myst_parser", "furo")
LARGEST_FIGURE = 300_000


def test_there_are_pages():
    assert len(PAGES) > 25 and {*QUICK} <= {pages.name_of(page) for page in PAGES}


@pytest.mark.parametrize("page", QUICK)
def test_python_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert pages.run_examples(ROOT / page)


@pytest.mark.full
@pytest.mark.parametrize("page", [page for page in PAGES if pages.blocks(page, "python")], ids=pages.name_of)
def test_python_runs_as_a_reader_runs_it(page, tmp_path):
    """Without the checker of shapes, for which jax's stand-ins for arrays on meshes are no arrays."""
    child = [sys.executable, str(ROOT / "tests" / "pages.py"), str(page)]
    done = subprocess.run(child, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if pages.commands(page)], ids=pages.name_of)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in pages.commands(page):
        pages.check_command(words, monkeypatch)


def test_a_command_that_is_wrong_is_found(monkeypatch):
    for words in (
        ["bicache", "generate", "--input", "x", "--model", "m", "--boundry", "3"],
        ["bicache", "generate", "--input", "examples/none.jsonl", "--model", "m"],
        ["python", "scripts/draw_idea.py"],
        ["pip", "install", ".[nothing]"],
        ["make", "docs"],
    ):
        with pytest.raises((AssertionError, bicache_jax.BicacheError, SystemExit)):
            pages.check_command(words, monkeypatch)


def test_paths_and_links_exist():
    missing = [(pages.name_of(page), link) for page in PAGES for link in pages.broken_links(page)]
    for page in PAGES:
        homes = (ROOT, ROOT / "bicache_jax", page.parent)
        named = pages.paths(page)
        missing += [(pages.name_of(page), path) for path in named if not any((home / path).exists() for home in homes)]
    assert not missing


def test_figures_are_small():
    figures = [path for path in (DOCS / "_static").iterdir() if path.suffix in (".webp", ".png", ".svg", ".gif")]
    assert {"run.webp", "steps.png"} <= {path.name for path in figures}
    assert all(path.stat().st_size < LARGEST_FIGURE for path in figures)


class _Links(HTMLParser):
    """Targets and links of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.words = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)

    def handle_data(self, data: str) -> None:
        self.words += data


def dead_links(site: Path) -> list[str]:
    """Links within a site to files or targets that are not there."""
    found = {path.resolve(): _Links(path) for path in site.rglob("*.html")}
    dead = []
    for page, parsed in found.items():
        for link in parsed.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            there = target.is_file() or (target / "index.html").is_file()
            anchored = not parts.fragment or target not in found or unquote(parts.fragment) in found[target].ids
            if not (there and anchored):
                dead.append(f"{page.relative_to(site.resolve())}: {link}")
    return dead


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, EXTRA)), reason="needs pip install 'bicache-jax[docs]'")
def test_site_builds_and_says_what_the_library_says(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not dead_links(tmp_path)
    (tmp_path / "index.html").write_text('<a href="nowhere.html">', encoding="utf-8")
    assert dead_links(tmp_path) == ["index.html: nowhere.html"]
    reference = _Links(tmp_path / "reference" / "commands.html")
    (choices,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    for name in COMMANDS:
        for action in choices[name]._actions:
            flag = max(action.option_strings, key=len)
            assert action.dest == "help" or f"cmdoption-bicache-{name}-{flag.lstrip('-')}" in reference.ids, (
                name,
                flag,
            )
    python = _Links(tmp_path / "reference" / "python.html")
    assert {f"bicache_jax.{name}" for name in bicache_jax.__all__} <= python.ids
    assert "boundary" in (tmp_path / "searchindex.js").read_text(encoding="utf-8")
