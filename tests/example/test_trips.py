"""The task on which naive prefix caching fails, and the model in `examples/trips` that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bicache_jax import load_model
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.measure.evaluate import evaluate, items_of

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "trips"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_answers_follow_from_document_and_rule() -> None:
    import trips

    records = list(trips.draw_requests(90_001, 120))
    assert {record["kind"] for record in records} == set(trips.KINDS)
    for record in records:
        words = record["prompt"].split()
        document = " ".join(words[: record["prefix_len"]]).split(" . ")
        journeys = [(said.split()[1], said.split()[3], said.split()[5]) for said in document]
        rest = words[record["prefix_len"] :]
        end = len(rest) - rest[::-1].index(".")
        region = {said.split()[0]: said.split()[1] for said in " ".join(rest[: end - 1]).split(" . ")}
        asked = rest[end:]
        if record["kind"] == "within":
            found = [name for a, b, name in journeys if region[a] == region[b]]
        elif record["kind"] == "regions":
            found = [name for a, b, name in journeys if (region[a], region[b]) == (asked[1], asked[3])]
        else:
            found = [name for a, b, name in journeys if (a, b) == (asked[1], asked[3])]
        assert found == [record["answer"]], record


def test_training_shows_documents_what_it_says() -> None:
    import collapse_study
    import trips

    inputs, targets, counts, everything = collapse_study.draw_batch(1, 500, alone=False)
    *same, alone = collapse_study.draw_batch(1, 500, alone=True)
    assert all(map(np.array_equal, same, (inputs, targets, counts)))
    assert (inputs[counts] == trips.TOKEN_ID["<mask>"]).all() and counts.any(axis=1).all()
    assert (everything == everything[:, :1]).all()
    for row in range(len(inputs)):
        document = len(alone[row]) - int((alone[row] != everything[row]).any(axis=1)[::-1].argmax())
        length = int(everything[row, 0].sum())
        assert 0 < document < length
        assert not alone[row, :document, document:].any()
        assert alone[row, :document, :document].all() and alone[row, document:, :length].all()


@pytest.mark.full
def test_naive_caching_fails_where_the_document_must_read_the_rule() -> None:
    model = load_model(str(EXAMPLE / "bidirectional" / "model"))
    sampling = SamplingConfig(gen_length=8)
    lines = (EXAMPLE / "questions.jsonl").read_bytes().splitlines()[:96]
    items = items_of(lines, model, sampling, "questions.jsonl")
    cache = CacheConfig(boundary=1, refresh_interval=16)
    none, naive, bicache = evaluate(
        model, items, ["none", "naive", "bicache"], cache=cache, sampling=sampling, timed=0, batch_size=32
    )
    assert none["exact_match"] > 0.9 and bicache["exact_match"] > 0.9
    assert bicache["agreement"] > 0.95
    assert all(naive["by_kind"][kind]["exact_match"] < 0.4 for kind in ("regions", "within"))


def test_committed_figures_are_those_of_the_committed_model() -> None:
    import collapse_study

    study = json.loads((EXAMPLE / "study.json").read_text())
    found = study["bidirectional"]
    model = load_model(str(EXAMPLE / "bidirectional" / "model"))
    items = collapse_study.items_from(model, collapse_study.task.CALIBRATION, 96)
    np.testing.assert_allclose(collapse_study.similarity(model, items), found["similarity"], atol=2e-4)
    rows = {row["boundary"]: row["exact_match"] for row in found["rows"] if row["refresh_interval"] == 16}
    assert list(rows) == [*range(model.config.num_layers + 1)]
    policies = json.loads((EXAMPLE / "policies.json").read_text())["results"]
    assert [one["policy"] for one in policies] == ["none", "naive", "bicache"]
    for one, wanted in zip(policies, (found["none"], rows[6], rows[found["boundary_by_answers"]]), strict=True):
        assert one["samples"] == study["samples"]
        assert one["exact_match"] == pytest.approx(wanted["all"], abs=1e-5)
    log = (EXAMPLE / "bidirectional" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == study["steps"]
