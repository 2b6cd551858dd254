from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest

from bicache_jax import BicacheError, configs, load_model
from bicache_jax.boundary import BoundaryTable, boundary_at, fingerprint, load_table
from bicache_jax.profiling import Sample, make_table, measure, shallow_layers, synthetic_samples


def _write(folder: Path, **changes: Any) -> Path:
    record = {"model": "m", "fingerprint": "f", "num_layers": 8, "threshold": 0.97, "samples_per_ratio": 3}
    record |= {"table": {"0": 1, "30": 4}, "similarity": None} | changes
    path = folder / "table.json"
    path.write_text(json.dumps(record))
    return path


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    table = load_table(_write(tmp_path, similarity={"30": [1.0, 0.5]}))
    assert [table.boundary(ratio) for ratio in (0, 29, 30, 100)] == [1, 1, 4, 4]
    assert boundary_at({10: 2}, 9) == 0
    (tmp_path / "again.json").write_text(json.dumps(table.to_json()))
    assert load_table(tmp_path / "again.json") == table


@pytest.mark.parametrize(
    "changes",
    [
        {"table": {}},
        {"table": {"101": 1}},
        {"table": {"x": 1}},
        {"table": {"0": 9}},
        {"table": {"0": True}},
        {"table": {"0": 3, "10": 2}},
        {"num_layers": 0},
        {"threshold": "high"},
        {"similarity": 3},
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BicacheError, match=r"table\.json"):
        load_table(_write(tmp_path, **changes))


def test_published_tables_serve_their_architecture_only() -> None:
    table = configs.published_table(configs.model_shape("llada_8b"))
    assert table is not None and [table.boundary(r) for r in (0, 4, 5, 49, 99, 100)] == [1, 1, 2, 11, 32, 32]
    dream = configs.published_table(configs.model_shape("dream_7b"))
    assert dream is not None and [dream.boundary(r) for r in (8, 9, 95, 96)] == [1, 2, 18, 28]
    other = dataclasses.replace(configs.model_shape("llada_8b"), num_layers=30)
    assert configs.published_table(other) is None


def test_fingerprints_tell_checkpoints_apart() -> None:
    norm = [("n", np.ones(3, np.float32))]
    base = fingerprint({"a": 1}, {"w": ("F32", (2, 3))}, norm)
    assert base == fingerprint({"a": 1}, {"w": ("F32", (2, 3))}, norm)
    assert base != fingerprint({"a": 2}, {"w": ("F32", (2, 3))}, norm)
    assert base != fingerprint({"a": 1}, {"w": ("F16", (2, 3))}, norm)
    assert base != fingerprint({"a": 1}, {"w": ("F32", (2, 3))}, [("n", np.full(3, 2, np.float32))])


def test_leading_layers_count_and_tables_do_not_decrease() -> None:
    assert shallow_layers([1.0, 0.98, 0.96, 0.99], 0.97) == 2
    assert shallow_layers([1.0, 0.98], 0.97) == 2 and shallow_layers([0.97], 0.97) == 0
    model = dataclasses.replace(load_model(golden.FOLDERS["llada"]), name="m")
    table = make_table(model, [(10, [1.0, 0.98]), (20, [1.0, 0.9]), (20, [1.0, 0.96]), (90, [1.0, 0.99])])
    assert table.table == {10: 2, 20: 2, 90: 2} and table.samples_per_ratio == 1
    assert table.similarity is not None and table.similarity[20] == pytest.approx((1.0, 0.93))


def test_measuring_in_batches_gives_the_recorded_similarity() -> None:
    model = load_model(golden.FOLDERS["llada"])
    ids = tuple(map(int, golden.expected("llada")["forward_ids"][0]))
    samples = [Sample(ids, size, 0) for size in (16, 30, 16)] + [Sample(ids[:40], 39, 0)]
    found = dict(measure(model, samples))
    assert sorted(found) == [0, 1, 2, 3]
    for place, size in ((0, 16), (1, 30), (2, 16)):
        np.testing.assert_allclose(found[place], golden.expected("llada")[f"similarity_P{size}"], atol=1e-4)


def test_texts_are_split_at_every_ratio() -> None:
    samples = synthetic_samples([list(range(50)), [7]], ratio_step=10, per_ratio=2, seed=0, most_tokens=20)
    assert [sample.ratio for sample in samples] == [r for r in range(10, 100, 10) for _ in range(2)]
    assert all(len(sample.ids) == 20 and sample.prefix_len == sample.ratio // 5 for sample in samples)


def test_profile_writes_the_same_table_after_a_restart(tmp_path: Path) -> None:
    from bicache_jax.cli import main

    texts = tmp_path / "texts.jsonl"
    rng = np.random.default_rng(0)
    texts.write_text("".join(json.dumps({"prompt_ids": rng.integers(2, 290, 40).tolist()}) + "\n" for _ in range(4)))
    flags = ["--model", str(golden.FOLDERS["llada"]), "--data", str(texts), "--synthetic", "--samples", "2"]
    flags += ["--ratio-step", "25", "--threshold", "0.5", "--quiet"]
    output = tmp_path / "table.json"
    assert main(["profile", *flags, "--output", str(output)]) == 0
    table = load_table(output)
    assert isinstance(table, BoundaryTable) and table.fingerprint == load_model(golden.FOLDERS["llada"]).fingerprint
    assert list(table.table) == [25, 50, 75] and table.samples_per_ratio == 2
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert main(["profile", *flags, "--output", str(output), "--resume"]) == 0
    assert load_table(output) == table
