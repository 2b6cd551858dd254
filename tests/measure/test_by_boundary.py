"""Verdicts on boundaries: from measurements that are known, and from answers of the bundled model."""

from __future__ import annotations

from typing import Any

import pytest

from bicache_jax import BicacheError, CacheConfig, SamplingConfig, load_model
from bicache_jax.example import task
from bicache_jax.measure.by_boundary import accuracy_by_boundary, verdict
from bicache_jax.measure.evaluate import evaluate, items_of
from bicache_jax.measure.plots import accuracy_over_boundaries, bars, similarity_heat_map
from bicache_jax.measure.profile import profile_model


def row(boundary: int, difference: float, interval: tuple[float, float], samples: int = 300) -> dict[str, Any]:
    return {
        "boundary": boundary,
        "difference": difference,
        "difference_interval": list(interval),
        "samples": samples,
    }


def test_a_verdict_needs_questions_enough():
    rows = [
        row(0, 0.0, (0.0, 0.0)),
        row(1, 0.001, (-0.01, 0.01)),
        row(2, -0.6, (-0.65, -0.55)),
        row(3, 0.0, (0.0, 0.0)),
    ]
    found = verdict(rows)
    assert [found.judge(b) for b in (0, 1, 2, 3, 4)] == ["safe", "safe", "unsafe", "open", "open"]
    assert found.deepest() == 1
    assert "-60.0 (-65.0 to -55.0)" in str(found) and "unsafe" in found._repr_html_()
    few = verdict([row(0, 0.0, (0.0, 0.0), samples=30)])  # no difference in 30 questions: one in ten is possible
    assert few.judge(0) == "open" and few.deepest() is None
    assert verdict([row(0, 0.0, (0.0, 0.0), samples=30)], margin=0.11).deepest() == 0
    with pytest.raises(ValueError, match="measurements"):
        verdict([])
    with pytest.raises(ValueError, match="margin"):
        verdict(rows, margin=0.0)


def test_accuracy_by_boundary_is_what_evaluate_finds():
    model, sampling = load_model("example"), SamplingConfig(gen_length=8)
    lines = list(task.draw_requests(task.FIRST_HELD_OUT, 4, people=(4, 4), facts=(2, 2)))
    items = items_of(lines, model, sampling, "test")
    made: list[int] = []
    rows = accuracy_by_boundary(model, items, sampling=sampling, boundaries=(8,), progress=made.append)
    assert sum(made) == 2 * 4 and [r["boundary"] for r in rows] == [8]
    none, naive = evaluate(model, items, ["none", "naive"], cache=CacheConfig(), sampling=sampling, timed=0)
    assert rows[0]["without_cache"] == none["exact_match"] and rows[0]["exact_match"] == naive["exact_match"]
    for key in ("difference", "difference_interval", "mcnemar_p", "by_kind", "by_ratio"):
        assert rows[0][key] == naive[key]
    assert verdict(rows).judge(8) in ("open", "unsafe")  # four questions show nothing

    table = profile_model(model, [{"prompt": x["prompt"], "prefix_len": x["prefix_len"]} for x in lines], samples=2)
    assert table.fingerprint == model.fingerprint and table.similarity and max(table.table.values()) <= 8
    for figure in (accuracy_over_boundaries(rows), bars({"a": 1.0, "b": 2.0}, label="x"), similarity_heat_map(table)):
        assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(BicacheError, match="no request has a shared prefix"):
        profile_model(model, "who lives in Oslo")
    with pytest.raises(BicacheError, match="no questions"):
        accuracy_by_boundary(model, [], sampling=sampling)
