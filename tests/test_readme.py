"""The README: its commands, its example, its links and the paths it names are real."""

from __future__ import annotations

import re
from pathlib import Path

import pages
import pytest
from pages import README, ROOT

TEXT = README.read_text(encoding="utf-8")


def test_python_example_is_short_and_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (example,) = pages.blocks(README, "python")
    assert len(example.splitlines()) <= 10
    (said,) = pages.run_examples(README)
    assert [line.split()[0] for line in said.splitlines()] == ["Oslo", "Tom"]


def test_commands_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = pages.commands(README)
    main = next(words for words in found if words[:2] == ["bicache", "generate"])
    assert main[main.index("--model") + 1] == "example" and Path(main[main.index("--input") + 1]).is_file()
    for words in found:
        pages.check_command(words, monkeypatch)
    tests = [line for block in pages.blocks(README, "bash") for line in block.splitlines() if "pytest" in line]
    assert tests and tests[-1] in (ROOT / ".ci" / "run").read_text()


def test_links_and_paths_lead_somewhere():
    assert "](docs/" in TEXT and not list(pages.broken_links(README))
    assert all((ROOT / path).exists() for path in pages.paths(README))


@pytest.mark.skipif(not (ROOT / "models").exists(), reason="an unpacked sdist has no top-level folders")
def test_every_top_level_folder_is_explained():
    explained = re.findall(r"^(\w+)/ ", TEXT, re.MULTILINE)
    assert {*explained} == {
        "bicache_jax",
        "models",
        "kernels",
        "configs",
        "scripts",
        "examples",
        "notebooks",
        "docs",
        "tests",
    }
    assert all((ROOT / folder).is_dir() for folder in explained)


def test_it_stays_short():
    """One screen and a half: what is more belongs into the documentation."""
    assert len(TEXT.splitlines()) <= 130
