"""`bicache generate` and `bicache batch` give the same results for the same requests and flags, by every decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import FOLDERS

from bicache_jax.cli import main

PREFIX = list(range(10, 30))
FLAGS = ["--boundary", "2", "--refresh-interval", "4", "--gen-length", "32", "--batch-size", "4", "--seed", "3"]
FLAGS += ["--no-compilation-cache", "--quiet"]  # it would change jax's configuration for the rest of the test process
# Lengths of their own: below the block that a block cache implies, no multiple of it, and with a block named.
OWN = [{}, {"gen_length": 16, "steps": 4}, {"gen_length": 48}, {"gen_length": 48, "block_length": 16}]


def write_lines(path: Path) -> None:
    lines = [{"id": f"q{i}", "prompt_ids": [*PREFIX, 40 + i, 50 + i], **own} for i, own in enumerate(OWN)]
    lines += [{"id": "two", "prompt_ids": [*PREFIX[5:], 7], "gen_length": 16, "steps": 4, "n": 2, "seed": 9}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "block_cache", "decoder"),
    [
        ("llada", "dual", []),
        ("llada", "off", ["--threshold", "0.02"]),
        ("llada", "dual", ["--cfg-scale", "0.5", "--steps", "16"]),
        ("llada", "prefix", ["--factor", "1.5"]),
        ("llada", "prefix", ["--temperature", "0.7", "--top-p", "0.9"]),
        ("dream", "off", ["--temperature", "0.7", "--top-k", "8", "--steps", "16"]),
        ("dream", "dual", ["--threshold", "0.02"]),
        ("dream", "prefix", ["--remasking", "topk_margin", "--steps", "16"]),
    ],
    ids=lambda value: " ".join(value).replace("--", "") or "schedule" if isinstance(value, list) else value,
)
def test_generate_and_batch_give_the_same_results(family, block_cache, decoder, tmp_path):
    write_lines(tmp_path / "in.jsonl")
    flags = ["--model", str(FOLDERS[family]), *FLAGS, "--block-cache", block_cache, *decoder]
    flags += ["--input", str(tmp_path / "in.jsonl")]
    assert main(["generate", *flags, "--output", str(tmp_path / "out.jsonl")]) == 3
    assert main(["batch", *flags, "--output", str(tmp_path / "out")]) == 3
    made = (tmp_path / "out.jsonl").read_bytes()
    assert (tmp_path / "out" / "in.jsonl").read_bytes() == made
    reasons = {record["id"]: record["finish_reason"] for record in map(json.loads, made.splitlines())}
    bad = {name for name, reason in reasons.items() if reason == "error"}
    expected = {"6"}
    if block_cache != "off":  # 48 tokens are not whole blocks of 32
        expected.add("q2")
    if "--steps" in decoder:  # 16 steps cannot be the same number for each of three blocks
        expected.add("q3")
    assert bad == expected
