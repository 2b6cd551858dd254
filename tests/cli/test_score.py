"""`bicache score`: results in input order, bad lines among good ones, a journal that continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden
import pytest

from bicache_jax.cli import main
from bicache_jax.serving.looking import Looking

LINES = [
    {"id": "a", "prompt_ids": [*range(20, 50), 7], "choices_ids": [[61, 33], [8]], "answer": 1},
    {"id": "b", "prompt_ids": [*range(20, 50), 9, 4], "continuation_ids": [61]},
    {"id": "bad", "prompt_ids": [5]},
    {"prompt_ids": [*range(20, 50), 11], "continuation_ids": [61, 8, 9], "seed": 3},
]


@pytest.fixture
def score(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Any:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + "not json\n")

    def run(*flags: str, output: str = "out.jsonl") -> tuple[int, str]:
        where = [str(tmp_path / "in.jsonl"), "--output", output if output == "-" else str(tmp_path / output)]
        more = ["--method", "pseudo", "--boundary", "2"]
        status = main(["score", "--model", str(golden.FOLDERS["llada"]), "--input", *where, *more, *flags])
        said = capfdbinary.readouterr()
        return status, (said.out if output == "-" else said.err).decode()

    return run


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_written_in_order_and_bad_lines_named(score: Any, tmp_path: Path) -> None:
    status, said = score()
    assert status == 3 and "5 scores (2 of them errors)" in said and " of 1)" in said
    found = _read(tmp_path / "out.jsonl")
    assert [one["id"] for one in found] == ["a", "b", "bad", "4", "5"]
    assert (
        "in.jsonl, line 3: must have exactly one of 'continuation'" in found[2]["error"]
        and "line 5" in found[4]["error"]
    )
    assert set(found[2]) == {"id", "error"}
    assert [choice["tokens"] for choice in found[0]["choices"]] == [2, 1] and found[0]["prefix_len"] == 30
    assert found[0]["log_likelihood"] == max(choice["log_likelihood"] for choice in found[0]["choices"])
    assert "greedy" not in found[1]["choices"][0]
    status, out = score("--quiet", output="-")
    assert status == 3 and [json.loads(line) for line in out.splitlines()] == found


def test_a_run_that_was_cut_short_continues(score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score()
    whole = (tmp_path / "out.jsonl").read_bytes()
    collect = Looking._collect

    def stop(self: Looking, *args: Any) -> Any:
        for number, done in enumerate(collect(self, *args)):
            yield done
            if number == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(Looking, "_collect", stop)
    assert score("--batch-size", "1", output="cut.jsonl")[0] == 130
    monkeypatch.setattr(Looking, "_collect", collect)
    assert (tmp_path / "cut.jsonl.journal").exists()
    status, said = score(output="cut.jsonl")
    assert status == 2 and "--resume" in said
    status, said = score("--resume", "--method", "exact", output="cut.jsonl")
    assert status == 2 and "method was" in said
    status, said = score("--resume", output="cut.jsonl")
    assert status == 3 and "1 from the journal" in said
    found, wanted = _read(tmp_path / "cut.jsonl"), [json.loads(line) for line in whole.splitlines()]
    for one, other in zip(found, wanted, strict=True):
        if "error" not in other:
            assert one["log_likelihood"] == pytest.approx(other["log_likelihood"], rel=1e-5)
        assert {name: one.get(name) for name in ("id", "error", "prefix_len", "boundary")} == {
            name: other.get(name) for name in ("id", "error", "prefix_len", "boundary")
        }
    assert score("--resume", output="cut.jsonl")[0] == 3


def test_flags_are_checked(score: Any) -> None:
    for flags, said in (
        (["--samples", "20"], "--samples must be a multiple of"),
        (["--method", "mc"], "--method"),
        (["--policy", "none", "--boundary-table", "x"], "--boundary-table"),
    ):
        status, err = score(*flags)
        assert status == 2 and said in err and err.count("\n") == 1
