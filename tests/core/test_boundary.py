from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest

from bicache_jax import BicacheError, configs, load_model
from bicache_jax.checkpoints.fingerprint import fingerprint
from bicache_jax.cli import main
from bicache_jax.core.boundary import BoundaryTable, boundary_at, load_table
from bicache_jax.core.config import SamplingConfig
from bicache_jax.core.types import Request
from bicache_jax.measure.profile import (
    Sample,
    make_table,
    measure,
    samples_of_requests,
    shallow_layers,
    synthetic_samples,
)


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


def _profile(folder: Path, *flags: str) -> int:
    texts = folder / "texts.jsonl"
    rng = np.random.default_rng(0)
    texts.write_text("".join(json.dumps({"prompt_ids": rng.integers(2, 290, 40).tolist()}) + "\n" for _ in range(4)))
    common = ["--model", str(golden.FOLDERS["llada"]), "--data", str(texts), "--synthetic", "--samples", "2"]
    return main(["profile", *common, "--ratio-step", "25", "--threshold", "0.5", "--quiet", *flags])


def test_profile_goes_on_where_it_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, again = tmp_path / "table.json", tmp_path / "again.json"
    assert _profile(tmp_path, "--output", str(output)) == 0
    table = load_table(output)
    assert isinstance(table, BoundaryTable) and table.fingerprint == load_model(golden.FOLDERS["llada"]).fingerprint
    assert list(table.table) == [25, 50, 75] and table.samples_per_ratio == 2
    assert list(table.table.values()) == sorted(table.table.values())
    assert table.similarity is not None and {len(values) for values in table.similarity.values()} == {table.num_layers}
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    measured: list[int] = []

    def cut_short(model: Any, samples: list[Sample], **settings: Any) -> Any:
        for count, found in enumerate(measure(model, samples, **settings)):
            if count == 3:
                raise BicacheError("the power went out")
            measured.append(found[0])
            yield found

    monkeypatch.setattr("bicache_jax.measure.profile.measure", cut_short)
    assert _profile(tmp_path, "--output", str(again), "--no-plot") == 2
    assert not again.exists() and len(measured) == 3

    def rest(model: Any, samples: list[Sample], **settings: Any) -> Any:
        assert len(samples) == 3  # of six
        yield from measure(model, samples, **settings)

    monkeypatch.setattr("bicache_jax.measure.profile.measure", rest)
    assert _profile(tmp_path, "--output", str(again), "--no-plot", "--resume") == 0
    assert again.read_bytes() == output.read_bytes()
    assert not (tmp_path / "again.json.journal").exists() and not (tmp_path / "again.png").exists()


def test_profile_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    class Bar:
        def __init__(self, *, total: int, initial: int, **settings: Any) -> None:
            assert (total, initial) == (6, 0)

        def update(self) -> None:
            shown.append(1)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr("tqdm.tqdm", Bar)
    assert _profile(tmp_path, "--output", str(tmp_path / "table.json"), "--no-plot") == 0
    assert len(shown) == 6


def test_requests_are_measured_at_their_own_prefixes() -> None:
    sampling = SamplingConfig(gen_length=10)
    shared = tuple(range(5, 25))
    requests = [Request(str(i), (*shared, 30 + i, 40, 41, 42, 43), None, sampling) for i in range(3)]
    requests.append(Request("alone", (90, 91, 92), None, sampling))
    take = functools.partial(samples_of_requests, requests, ratio_step=5, mask_id=1)
    plain = take(per_ratio=2, with_response=False)
    assert [(s.ids, s.prefix_len, s.ratio) for s in plain] == [(r.prompt_ids, 20, 80) for r in requests[:2]]
    masked = take(per_ratio=9, with_response=True)
    assert [(s.ids[-11:], s.prefix_len, s.ratio) for s in masked] == [((43, *[1] * 10), 20, 55)] * 3


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ('{"prompt_ids": [5, 6]}\n', [], "no request has a shared prefix to measure; give 'prefix_len'"),
        ('{"prompt_ids": [5, 99999]}\n', [], "line 1"),
        ('{"prompt_ids": [5, 6]}\n', ["--output", "nowhere/table.json"], "nowhere"),
        ('{"prompt_ids": [5, 6]}\n', ["--threshold", "1.5"], "--threshold"),
        ('{"prompt_ids": [5, 6], "prefix_len": 1}\n', ["--attention", "pallas_tpu"], "attention"),
    ],
)
def test_what_cannot_be_profiled_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(content)
    common = ["--model", str(golden.FOLDERS["llada"]), "--data", "data.jsonl", "--output", "table.json"]
    assert main(["profile", *common, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bicache: error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "table.json").exists()
