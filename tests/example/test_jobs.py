"""The few-shot and the sampling job in `examples/`: drawn by their script, and with the prefixes they are made for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bicache_jax import Engine, load_model

ROOT = Path(__file__).parents[2]


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load_model("example"))


def test_the_files_are_what_the_script_draws(tmp_path):
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_jobs.py"), str(tmp_path)], check=True)
    for name in ("five_shot.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "examples" / name).read_bytes()


def test_few_shot_requests_share_all_but_their_question(engine):
    requests = lines("five_shot.jsonl")
    rows = engine.plan(requests).rows
    assert len(rows) == 64 and len({row.prefix for row in rows}) == 4
    for row in rows:
        prompt = next(request["prompt"] for request in requests if request["id"] == row.request.id).split()
        dot = len(prompt) - prompt[::-1].index(".")  # behind the answer to the last of the five
        assert dot <= row.prefix_len < len(prompt)
        assert row.ratio >= 90


def test_samples_share_their_whole_prompt(engine):
    rows = engine.plan(lines("samples.jsonl")).rows
    assert len(rows) == 64 and len({row.prefix for row in rows}) == 4
    assert {row.prefix_len for row in rows} == {len(row.request.prompt_ids) for row in rows}
    assert len({(row.request.sampling.seed + row.sample, row.request.id) for row in rows}) == 64
