"""The README: its commands, its example and the paths it names are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bicache_jax.cli import build_parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_python_examples_are_short_and_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = []
    for example in blocks("python"):
        assert len(example.splitlines()) <= 10
        exec(compile(example, "README.md", "exec"), {})
        said.append(capsys.readouterr().out)
    assert [line.split()[0] for line in said[0].splitlines()] == ["Oslo", "Tom"]
    assert re.fullmatch(r"Prefixes\(1 encoded, .* MiB, 1 added\) 1 2\n", said[1])


def test_commands_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("bicache ")]
    assert commands
    for command in commands:
        args = build_parser().parse_args(command[1:])
        files = [getattr(args, flag) for flag in ("input", "data") if hasattr(args, flag)]
        files = [name for named in files for name in (named if isinstance(named, list) else [named])]
        assert all(Path(file).is_file() for file in files)
        paths = [getattr(args, flag, None) or "" for flag in ("model", "task")]
        assert all(Path(path).exists() for path in paths if "/" in path)
    tests = [line for line in lines if "pytest" in line]
    assert tests and tests[-1] in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w./]+/[\w./]*|[\w./]+\.(?:py|json|jsonl|toml))`", TEXT))))
def test_paths_exist(path):
    assert (ROOT / path).exists() or (ROOT / "bicache_jax" / path).exists()


@pytest.mark.skipif(not (ROOT / "models").exists(), reason="an unpacked sdist has no top-level folders")
def test_every_top_level_folder_is_explained():
    for folder in ("bicache_jax", "models", "kernels", "configs", "scripts", "tests"):
        assert re.search(rf"^{folder}/ ", TEXT, re.MULTILINE), folder
