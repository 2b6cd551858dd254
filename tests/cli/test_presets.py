"""Presets: data with a source, made of flags that exist, and weaker than any flag."""

from __future__ import annotations

import argparse
import ast
import itertools
from pathlib import Path

import pytest

from bicache_jax.cli import build_parser, main, options
from bicache_jax.cli.generate import configurations
from bicache_jax.cli.options import Parser
from bicache_jax.cli.presets import EXCLUSIVE, presets
from bicache_jax.core.types import BicacheError

BASE = ["generate", "--model", "m", "--input", "i"]


def parsed(*flags: str) -> dict:
    return vars(build_parser().parse_args([*BASE, *flags]))


@pytest.mark.parametrize("name", presets())
def test_presets_are_flags_with_a_source(name):
    preset = presets()[name]
    assert set(preset) == {"summary", "source", "flags"} and "http" in preset["source"]
    args = build_parser().parse_args([*BASE, "--preset", name])
    plain = parsed()
    for flag, value in preset["flags"].items():
        assert getattr(args, flag) == value
        # What argparse would make of the same words on the command line.
        words = [f"--{flag.replace('_', '-')}"] if value is True else [f"--{flag.replace('_', '-')}", str(value)]
        assert parsed(*words)[flag] == value
    changed = {flag for flag, value in vars(args).items() if value != plain[flag]} - {"preset"}
    assert changed <= set(preset["flags"])
    configurations(args)


def test_any_flag_overrides_wherever_it_is():
    assert parsed("--preset", "llada_8b")["block_length"] == 32
    for flags in (["--block-length", "64", "--preset", "llada_8b"], ["--preset", "llada_8b", "--block-length", "64"]):
        assert parsed(*flags)["block_length"] == 64
    # Also a flag that says what would be so without the preset.
    assert parsed("--policy", "bicache", "--preset", "fast_dllm_llada")["policy"] == "bicache"
    assert parsed("--preset", "fast_dllm_llada")["policy"] == "none"
    assert parsed()["policy"] == "auto"


@pytest.fixture
def small_parser() -> Parser:
    parser = Parser()
    parser.presettable, parser.exclusive = ("steps", "shape", "threshold", "factor"), [("threshold", "factor")]
    parser.add_argument("--preset", type=lambda name: {"threshold": 0.9, "steps": 4})
    parser.add_argument("--steps", type=int)
    parser.add_argument("--shape", default="round")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--threshold", type=float)
    group.add_argument("--factor", type=float)
    return parser


def test_a_flag_rules_out_what_excludes_it(small_parser):
    parser = small_parser
    assert vars(parser.parse_args(["--preset", "x"])) | {"preset": 0} == {
        "preset": 0, "steps": 4, "shape": "round", "threshold": 0.9, "factor": None,
    }  # fmt: skip
    assert parser.parse_args(["--factor", "1", "--preset", "x"]).threshold is None
    assert parser.parse_args(["--threshold", "0.5", "--preset", "x"]).threshold == 0.5
    # Nothing of one line is left to the next.
    assert vars(parser.parse_args([])) == {
        "preset": None, "steps": None, "shape": "round", "threshold": None, "factor": None,
    }  # fmt: skip
    with pytest.raises(BicacheError, match="not allowed with"):
        parser.parse_args(["--threshold", "0.5", "--factor", "1", "--preset", "x"])


def test_a_preset_and_flags_below_a_subcommand(small_parser):
    top = Parser()
    top.add_argument("--steps", type=int, default=9)
    commands = top.add_subparsers(dest="command")
    commands.add_parser("go", parents=[small_parser], add_help=False).presettable = small_parser.presettable
    assert top.parse_args(["go", "--preset", "x"]).steps == 4
    assert top.parse_args(["go", "--preset", "x", "--steps", "5"]).steps == 5
    assert top.parse_args([]).steps == 9


def test_nothing_private_of_argparse_is_used():
    """Its privates change between releases of Python."""
    private = {name for name in dir(argparse.ArgumentParser()) if name.startswith("_") and not name.startswith("__")}
    for path in Path(options.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                of_argparse = isinstance(node.value, ast.Name) and node.value.id == "argparse"
                assert not of_argparse and node.attr not in private, f"{path.name}:{node.lineno} uses {node.attr}"


def test_the_flags_that_exclude_one_another_are_those_of_the_parser():
    for group in EXCLUSIVE:
        for one, other in itertools.permutations(group, 2):
            flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
            with pytest.raises(BicacheError, match=f"{flags[1]}: not allowed with argument {flags[0]}"):
                parsed(flags[0], "1", flags[1], "1")
        assert parsed("--preset", "fast_dllm_llada", "--factor", "1")["threshold"] is None


def test_unknown_presets_and_help(capsys):
    assert main([*BASE, "--preset", "nothing"]) == 2
    assert "no preset 'nothing'; there are " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in presets())
