"""The studies of boundaries and of the paper's claims, in small, and what is committed of them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bicache_jax import load_model
from bicache_jax.core.boundary import load_table
from bicache_jax.example import task

ROOT = Path(__file__).parents[2]
TRIPS = ROOT / "examples" / "trips"
RESULTS = ROOT / "scripts" / "results"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_the_papers_comparison_runs_on_the_bundled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import reproduce_paper

    output = tmp_path / "reproduction"
    flags = ["--model", "example", "--tasks", "example", "--samples", "6", "--gen-length", "8", "--steps", "4"]
    more = ["--block-length", "4", "--refresh-interval", "auto", "--timed", "0", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", *flags, *more])
    reproduce_paper.main()
    record = json.loads(output.with_suffix(".json").read_text())
    (part,) = record["tasks"]
    assert tuple(result["policy"] for result in part["results"]) == reproduce_paper.POLICIES
    assert len(part["similarity"]["layers"]) == record["layers"] == 8
    assert output.with_suffix(".md").read_text() == capsys.readouterr().out == reproduce_paper.page(record)
    assert "not timed; counted operations allow +" in reproduce_paper.page(record)


def _result(accuracy: float, difference: float, p: float = 1.0, speed: float | None = None) -> dict[str, Any]:
    interval = [difference - 0.01, difference + 0.01]
    shown = {"difference": difference, "difference_interval": interval, "mcnemar_p": p, "limit": 2.0}
    return {"exact_match": accuracy, "tokens_per_s": speed, **shown}


def test_claims_are_judged_by_what_was_measured() -> None:
    import reproduce_paper

    def verdicts(**found: dict[str, Any]) -> list[bool | None]:
        alike = {"layers": [1.0, 0.98, 0.9], "depths": {"25": 1, "50": 2}}
        named = {name.replace("_", "+"): result for name, result in found.items()}
        return [claim.ours(named, alike)[1] for claim in reproduce_paper.CLAIMS]

    none = _result(0.9, 0.0, speed=100.0)
    published = verdicts(
        none=none,
        naive=_result(0.01, -0.89, p=0.0),
        bicache=_result(0.89, -0.01, speed=140.0),
        none_dual=_result(0.9, 0.0, speed=200.0),
        bicache_dual=_result(0.9, 0.0, speed=390.0),
    )
    assert published == [True] * 5
    other = verdicts(none=none, naive=_result(0.4, -0.5, p=0.0), bicache=_result(0.8, -0.1, speed=120.0))
    assert other == [False, True, True, False, False]
    assert verdicts(none=none) == [None, True, True, None, None]


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("reproduction_example", "reproduce_paper"),
        ("reproduction_trips", "reproduce_paper"),
        ("adaptive_refresh", "adaptive_refresh"),
    ],
)
def test_committed_pages_are_made_of_committed_results(name: str, script: str) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == importlib.import_module(script).page(record)


@pytest.mark.parametrize(
    ("path", "name", "boundary"),
    [
        (TRIPS / "by_answers.json", str(TRIPS / "bidirectional" / "model"), 1),
        (RESULTS / "by_answers_example.json", "example", 8),
    ],
)
def test_the_committed_tables_are_of_their_models_and_on_the_page(path: Path, name: str, boundary: int) -> None:
    table = load_table(path)
    assert table.criterion == "answers" and set(table.table.values()) == {boundary}
    assert table.doubt(load_model(name)) is None
    page = (ROOT / "docs" / "results" / "by-answers.md").read_text()
    for found in next(iter(json.loads(path.read_text())["answers"]["by_ratio"].values()))["tested"]:
        loss = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * found[key] for key in ("loss", "at_least", "at_most")))
        assert f"| {loss} | {found['requests']} |" in page


def test_refreshing_by_drift_is_the_engines_loop_where_it_does_not_adapt() -> None:
    import adaptive_refresh
    from adaptive_refresh import RULES

    lines = list(task.draw_requests(task.FIRST_HELD_OUT, 6, people=(3, 3), facts=(2, 2)))
    found = adaptive_refresh.study("example", load_model("example"), lines, 2, 4)
    rows = {row["rule"]: row for row in found["rows"]}
    assert len(rows) == len(RULES)
    assert [rows[f"N = {n}"]["refreshes"] for n in (1, 2, 4, 16)] == [4, 2, 1, 1]
    assert rows["N = 1, 50 % of the tokens"]["refreshes"] == pytest.approx(1 + 3 / 2, abs=0.2)
    loose, tight = rows["all > 0.2"], rows["all > 0.01"]
    assert 1 <= loose["refreshes"] <= tight["refreshes"] <= 4

    assert np.isfinite([one["same_answer"] for one in found["rows"]]).all()


def test_a_rule_wins_where_it_gains_more_than_chance_over_as_much_work() -> None:
    from adaptive_refresh import gains, winners

    signals = [("fixed", 1), ("fixed", 3), ("suffix", 2), ("first", 2), ("suffix", 9), ("all", 1)]
    rows = [{"signal": signal, "share": 1.0, "work": work} for signal, work in signals]
    right = [80, 90, 100, 86, 90, 100]  # of a hundred requests, the first so many
    answers = np.asarray([np.arange(100) < count for count in right], float)
    found = gains(rows, answers)
    assert [found[place] for place in (0, 1, 5)] == [None] * 3
    won, close, beyond = (np.asarray(found[place]) for place in (2, 3, 4))
    assert won[0] == pytest.approx(0.15) and won[1] > 0  # half way between 80 and 90
    assert close[0] == pytest.approx(0.01) and close[1] < 0 < close[2]
    assert beyond.tolist() == [0, 0, 0]
    assert winners([{**row, "gain": gain} for row, gain in zip(rows, found, strict=True)]) == [
        {**rows[2], "gain": found[2]}
    ]
