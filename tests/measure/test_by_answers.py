"""Boundaries chosen by answers: the search, what is lost, and the tables of small models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest

from bicache_jax import BicacheError, CacheConfig, Engine, SamplingConfig, load_model
from bicache_jax.cli import main
from bicache_jax.core.boundary import load_table, table_from_json
from bicache_jax.measure.by_answers import (
    Evidence,
    boundaries_by_answers,
    intervals_up_to,
    largest_within,
    loss_of,
    merged_ratios,
    summary,
)
from bicache_jax.measure.evaluate import ask, items_of

TRIPS = Path(__file__).parents[2] / "examples" / "trips"


def _judge(asked: list[int], within: Callable[[int], bool], outside: bool = True) -> Callable[[int], Evidence]:
    def test(candidate: int) -> Evidence:
        asked.append(candidate)
        verdict = "within" if within(candidate) else "outside" if outside else "open"
        return Evidence(candidate, 16, 1, 0.0, -1.0, 1.0, verdict)  # type: ignore[arg-type]

    return test


@pytest.mark.parametrize("last", range(-1, 13))
def test_the_largest_within_is_found_in_few_tests(last: int) -> None:
    asked: list[int] = []
    found = largest_within(range(13), _judge(asked, lambda b: b <= last))
    assert found == (None if last < 0 else last)
    assert len(asked) == len(set(asked)) <= 6  # one of the largest, four that halve, a neighbour


def test_what_is_not_monotone_is_not_trusted() -> None:
    asked: list[int] = []
    assert largest_within(range(9), _judge(asked, lambda b: b in (0, 1, 3))) == 1, "3 is within, but 2 is not"
    assert asked == [8, 3, 5, 4, 2, 1, 0]
    assert largest_within(range(9), _judge([], lambda b: b in (0, 1, 3), outside=False)) == 3, "2 may be"
    assert largest_within([], _judge([], lambda b: True)) is None


def test_ratios_with_few_requests_share_an_entry() -> None:
    ratios = [12, 13, 31, 58, 58, 59, 91]
    assert merged_ratios(ratios, 10, 1) == {10: [0, 1], 30: [2], 50: [3, 4, 5], 90: [6]}
    assert merged_ratios(ratios, 10, 3) == {10: [0, 1, 2], 50: [3, 4, 5, 6]}
    assert merged_ratios(ratios, 10, 99) == {10: list(range(7))}


def test_intervals_end_with_one_that_refreshes_once() -> None:
    assert intervals_up_to(8, 16) == [1, 2, 4, 16]
    assert intervals_up_to(16, 16) == [1, 2, 4, 8, 16]
    assert intervals_up_to(100, 16) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert intervals_up_to(1, 1) == [1]


def test_what_is_lost() -> None:
    plain, other = {"right": True, "tokens": [1, 2, 3, 4]}, {"right": False, "tokens": [1, 9, 3]}
    assert [loss_of(plain, other, scored=True), loss_of(other, plain, scored=True)] == [1, -1]
    assert loss_of(plain, other, scored=False) == loss_of(other, plain, scored=False) == 0.5
    assert loss_of(plain, plain, scored=False) == 0
    assert loss_of({"right": False, "tokens": []}, {"right": False, "tokens": []}, scored=False) == 0


@pytest.mark.full
def test_trips_keep_their_answers_up_to_the_first_layer() -> None:
    """By similarity it is b = 2, with which most answers are lost (docs/results/naive-caching.md)."""
    model, sampling = load_model(str(TRIPS / "bidirectional" / "model")), SamplingConfig(gen_length=8)
    lines: list[Any] = (TRIPS / "questions.jsonl").read_bytes().splitlines()[:192]
    items = items_of(lines, model, sampling, "trips")
    table = boundaries_by_answers(model, items, sampling=sampling)
    assert list(table.table.values()) == [1] and table.criterion == "answers" and table.answers is not None
    (found,) = table.answers["by_ratio"].values()
    assert found["boundary_by_similarity"] == 2 and found["shown"]
    tested = {one["boundary"]: one for one in found["tested"]}
    assert {0, 1, 2, 6} <= set(tested) and not {4, 5} & set(tested)
    assert tested[1]["requests"] == 192 and tested[6]["requests"] < 96, "what is clearly lost is given up early"
    assert tested[2]["drift"] > tested[1]["drift"], "the cheap measure sees it too"
    assert table.refresh_interval == 16 and table_from_json(table.to_json(), "again") == table
    assert any("b = 1 (by similarity 2)" in line for line in summary(table))


def _data(folder: Path, count: int, answers: bool) -> Path:
    rng = np.random.default_rng(0)
    shared = rng.integers(20, 200, 24).tolist()
    records: list[dict[str, Any]] = [
        {"id": f"q{i}", "prompt_ids": [*shared, *rng.integers(20, 200, 3 + 9 * (i % 2)).tolist()]} for i in range(count)
    ]
    if answers:
        for record in records[::2]:
            record["answer"] = "7"
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _profile(model: Path, data: Path, output: Path, *flags: str) -> int:
    common = ["--gen-length", "4", "--criterion", "answers", "--no-plot", "--no-compilation-cache"]
    named = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return main(["profile", *named, *common, *flags])


def test_a_random_model_is_measured_and_goes_on_where_it_was_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, folder = _data(tmp_path, 12, answers=True), golden.FOLDERS["llada"]
    whole, again = tmp_path / "whole.json", tmp_path / "again.json"
    assert _profile(folder, data, whole, "--max-loss", "40", "--confidence", "0.8") == 0
    assert "12 requests" in capsys.readouterr().err
    table = load_table(whole)
    assert table.answers is not None and table.answers["with_answers"] == 6
    assert table.fingerprint == load_model(folder).fingerprint and table.similarity is not None
    model = load_model(folder)
    assert Engine(model, cache=CacheConfig(table=table.table)).cache.table == table.table

    made = {"count": 0}

    def cut_short(*args: Any, **settings: Any) -> Any:
        made["count"] += 1
        if made["count"] == 2:
            raise BicacheError("the power went out")
        return ask(*args, **settings)

    monkeypatch.setattr("bicache_jax.measure.by_answers.ask", cut_short)
    flags = ("--max-loss", "40", "--confidence", "0.8", "--quiet")
    assert _profile(folder, data, again, *flags) == 2 and not again.exists()
    assert _profile(folder, data, again, *flags, "--resume") == 0
    assert again.read_bytes() == whole.read_bytes()


def test_a_model_of_another_family_without_answers(tmp_path: Path) -> None:
    data = _data(tmp_path, 8, answers=False)
    output = tmp_path / "table.json"
    folder = golden.DATA / "a2d-qwen3"
    mask = json.loads((folder / "cases.json").read_text())["mask_token_id"]
    assert _profile(folder, data, output, "--quiet", "--steps", "2", "--mask-id", str(mask)) == 0
    table = load_table(output)
    assert table.answers is not None and table.answers["with_answers"] == 0
    for found in table.answers["by_ratio"].values():
        for one in found["tested"]:
            assert 0 <= one["loss"] <= 1 and one["at_least"] <= one["loss"] <= one["at_most"] and one["drift"] >= 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-loss", "0"], "--max-loss"),
        (["--confidence", "1"], "--confidence"),
        (["--synthetic"], "--synthetic"),
        (["--max-tokens", "9"], "--max-tokens"),
        (["--criterion", "similarity", "--max-loss", "2"], "--max-loss"),
        (["--scorer", "nothing"], "scorer 'nothing'"),
        (["--gen-length", "4", "--steps", "3", "--block-length", "2"], "steps"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    data = _data(tmp_path, 2, answers=False)
    assert _profile(golden.FOLDERS["llada"], data, tmp_path / "table.json", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("bicache: error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "table.json").exists()


def test_tables_by_answers_are_checked_and_old_ones_are_read() -> None:
    old: dict[str, Any] = {"num_layers": 4, "table": {"0": 1}}
    assert table_from_json(old, "old").criterion == "similarity" and table_from_json(old, "old").answers is None
    for extra, message in (
        ({"criterion": "mood"}, "criterion"),
        ({"refresh_interval": 0}, "refresh_interval"),
        ({"answers": []}, "answers"),
    ):
        with pytest.raises(BicacheError, match=message):
            table_from_json(old | extra, "new")
    kept = table_from_json(old | {"criterion": "answers", "answers": {"max_loss": 0.005}}, "new")
    assert "0.5 points" in kept._repr_html_()
    assert "answers" not in dataclasses.replace(kept, answers=None).to_json()
