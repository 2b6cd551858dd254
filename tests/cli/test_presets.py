"""Presets: data with a source, made of flags that exist, and weaker than any flag."""

from __future__ import annotations

import pytest

from bicache_jax.cli import build_parser, main
from bicache_jax.cli.generate import configurations
from bicache_jax.cli.options import Parser
from bicache_jax.cli.presets import presets

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
        assert parsed(f"--{flag.replace('_', '-')}", str(value))[flag] == value
    changed = {flag for flag, value in vars(args).items() if value != plain[flag]} - {"preset"}
    assert changed <= set(preset["flags"])
    configurations(args)


def test_every_flag_precedes_wherever_it_stands():
    assert parsed("--preset", "llada_8b")["block_length"] == 32
    for flags in (["--block-length", "64", "--preset", "llada_8b"], ["--preset", "llada_8b", "--block-length", "64"]):
        assert parsed(*flags)["block_length"] == 64
    # Also a flag that says what would be so without the preset.
    assert parsed("--policy", "bicache", "--preset", "fast_dllm_llada")["policy"] == "bicache"
    assert parsed("--preset", "fast_dllm_llada")["policy"] == "none"
    assert parsed()["policy"] == "bicache"


def test_a_flag_rules_out_what_excludes_it():
    parser = Parser()
    parser.add_argument("--preset", type=lambda name: {"threshold": 0.9, "steps": 4})
    parser.add_argument("--steps", type=int)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--threshold", type=float)
    group.add_argument("--factor", type=float)
    assert vars(parser.parse_args(["--preset", "x"])) | {"preset": 0} == {
        "preset": 0, "steps": 4, "threshold": 0.9, "factor": None,
    }  # fmt: skip
    assert parser.parse_args(["--factor", "1", "--preset", "x"]).threshold is None
    assert parser.parse_args(["--threshold", "0.5", "--preset", "x"]).threshold == 0.5


def test_unknown_presets_and_help(capsys):
    assert main([*BASE, "--preset", "nothing"]) == 2
    assert "no preset 'nothing'; there are " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in presets())
