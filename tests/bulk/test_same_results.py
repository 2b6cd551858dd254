"""`bicache generate` and `bicache batch` give the same results for the same requests and flags, by every decoder."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest
from golden import FOLDERS

from bicache_jax import BicacheError, CacheConfig, Engine, Request, SamplingConfig, load_model
from bicache_jax.cli import main

PREFIX = list(range(10, 30))
FLAGS = ["--boundary", "2", "--refresh-interval", "4", "--gen-length", "32", "--batch-size", "4", "--seed", "3"]
FLAGS += ["--no-compilation-cache", "--quiet"]  # it would change jax's configuration for the rest of the test process
# Lengths of their own: below the block that a block cache implies, no multiple of it, and with a block named.
OWN = [{}, {"gen_length": 16, "steps": 4}, {"gen_length": 48}, {"gen_length": 48, "block_length": 16}]


def write_lines(path: Path, own: list[dict[str, int]]) -> None:
    lines = [{"id": f"q{i}", "prompt_ids": [*PREFIX, 40 + i, 50 + i], **one} for i, one in enumerate(own)]
    lines += [{"id": "two", "prompt_ids": [*PREFIX[5:], 7], "gen_length": 16, "steps": 4, "n": 2, "seed": 9}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n")


def case(family, block_cache, *decoder, mark=pytest.mark.slow):
    name = " ".join([family, block_cache, *decoder]).replace("--", "")
    return pytest.param(family, block_cache, list(decoder), id=name, marks=mark)


@pytest.mark.parametrize(
    ("family", "block_cache", "decoder"),
    [
        case("llada", "dual", mark=pytest.mark.full),
        case("llada", "off", "--threshold", "0.02", mark=pytest.mark.full),
        case("llada", "dual", "--cfg-scale", "0.5", "--steps", "16", mark=pytest.mark.full),
        case("llada", "prefix", "--factor", "1.5", mark=pytest.mark.full),
        case("llada", "prefix", "--temperature", "0.7", "--top-p", "0.9"),
        case("llada", "off", "--remasking", "random", "--logits-eos-inf"),
        case("llada", "dual", "--remasking", "entropy", "--alg-temperature", "0.5", "--early-stop"),
        case("llada", "off", "--batch-boundary", "min", "--no-early-stop"),
        case("dream", "off", "--temperature", "0.7", "--top-k", "8", "--steps", "16", mark=pytest.mark.full),
        case("dream", "off", "--remasking", "origin", "--steps", "16", mark=pytest.mark.full),
        case("dream", "dual", "--threshold", "0.02", mark=pytest.mark.full),
        case("dream", "dual", "--remasking", "maskgit_plus", "--confidence-eos-eot-inf"),
        case("dream", "prefix", "--remasking", "topk_margin", "--steps", "16"),
    ],
)
def test_generate_and_batch_give_the_same_results(family, block_cache, decoder, tmp_path):
    own = OWN if not decoder or "--steps" in decoder else OWN[:2]
    write_lines(tmp_path / "in.jsonl", own)
    flags = ["--model", str(FOLDERS[family]), *FLAGS, "--block-cache", block_cache, *decoder]
    flags += ["--input", str(tmp_path / "in.jsonl")]
    assert main(["generate", *flags, "--output", str(tmp_path / "out.jsonl")]) == 3
    assert main(["batch", *flags, "--output", str(tmp_path / "out")]) == 3
    made = (tmp_path / "out.jsonl").read_bytes()
    assert (tmp_path / "out" / "in.jsonl").read_bytes() == made
    reasons = {record["id"]: record["finish_reason"] for record in map(json.loads, made.splitlines())}
    bad = {name for name, reason in reasons.items() if reason == "error"}
    expected = {str(len(own) + 2)}
    if len(own) == 2:
        pass
    elif block_cache != "off":  # 48 tokens are not whole blocks of 32
        expected.add("q2")
    if len(own) > 2 and "--steps" in decoder:  # 16 steps cannot be the same number for each of three blocks
        expected.add("q3")
    assert bad == expected


@pytest.mark.parametrize(
    "policy",
    [
        "bicache+dual",
        pytest.param("naive+prefix", marks=pytest.mark.full),
        pytest.param("bicache", marks=pytest.mark.slow),
    ],
)
def test_evaluate_scores_what_generate_writes(policy, tmp_path, capsys):
    """The answers of each are those that the other is expected to give, block length left open."""
    name, _, block_cache = policy.partition("+")
    questions = [{"id": f"q{i}", "prompt_ids": [*PREFIX, 40 + i, 50 + i]} for i in range(3)]
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    shared = ["--model", str(FOLDERS["llada"]), "--gen-length", "64", "--seed", "3", *FLAGS[2:4], *FLAGS[-2:]]
    boundary = FLAGS[:2] if name == "bicache" else []
    flags = [*shared, *boundary, "--input", str(path), "--output", str(out), "--policy", name]
    assert main(["generate", *flags, "--block-cache", block_cache or "off"]) == 0
    eos = golden.model("llada")[0].eos_ids
    for question, line in zip(questions, out.read_text().splitlines(), strict=True):
        tokens = json.loads(line)["token_ids"]
        end = next((at for at, token in enumerate(tokens) if token in eos), None)
        question["answer"] = " ".join(map(str, tokens[:end]))
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    capsys.readouterr()
    flags = [*shared, *boundary, "--task", str(path), "--policies", policy, "--json", "--timed", "0"]
    assert main(["evaluate", *flags]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["exact_match"] == 1.0


def test_a_parsed_request_runs_as_its_line_does():
    model = load_model(FOLDERS["llada"])
    cache = CacheConfig(boundary=2, refresh_interval=4, block_cache="dual")
    engine = Engine(model, cache=cache, sampling=SamplingConfig(gen_length=64))
    ids = (*PREFIX, 40, 50)
    results = [
        engine.generate({"id": "q", "prompt_ids": ids, "prefix_len": 20}),
        engine.generate(Request("q", ids, 20, SamplingConfig(gen_length=64))),
        engine.generate(Request("q", ids, 20, SamplingConfig(gen_length=64, block_length=32))),
    ]
    assert results[0] == results[1] == results[2] and results[0][0].forward_passes
    with pytest.raises(BicacheError, match="request: gen_length must be a multiple of block_length, got 48 and 32"):
        engine.generate(Request("q", ids, 20, SamplingConfig(gen_length=48)))
