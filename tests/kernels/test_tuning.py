"""Tuning tables: the user's rows come before the library's, and a broken file costs nothing."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from bicache_jax.kernels import gpu, tpu, tuning
from bicache_jax.kernels.forms import candidates, shape_class

KIND = "NVIDIA H200"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tuning._user_rows.cache_clear()
    monkeypatch.setenv(tuning.ENVIRONMENT, str(tmp_path / "tuning"))
    return tmp_path / "tuning"


def test_a_users_rows_come_first_on_that_device_alone(folder: Path) -> None:
    before = gpu.form_for(KIND, 512, 128, "bfloat16")
    (chosen,) = [c for c in candidates("cuda", 512, 128, "bfloat16") if c.name.startswith("triton 128 x 32, 4")]
    path = tuning.save_rows("cuda", KIND, [chosen.row], {"jax": "0"})
    assert path == folder / "nvidia_h200.json"
    assert json.loads(path.read_text())["device_kind"] == KIND
    assert gpu.form_for(KIND, 512, 128, "bfloat16") == before, "this process goes on as it began"
    tuning._user_rows.cache_clear()
    assert gpu.form_for(KIND, 512, 128, "bfloat16") == gpu.Form("triton", 128, 32, 4, 3) != before
    assert gpu.form_for(KIND, 512, 128, "float16") == gpu.Form("triton", 128, 32, 4, 3), "one class"
    for kind in (None, "NVIDIA H100 80GB HBM3"):
        assert gpu.form_for(kind, 512, 128, "bfloat16") == before
    assert gpu.form_for(KIND, 512, 128, "float32") == gpu.form_for(None, 512, 128, "float32")
    assert gpu.form_for(KIND, 512, 256, "bfloat16").form == "library"


def test_a_tpus_rows_too(folder: Path) -> None:
    (first, *_) = candidates("tpu", 4096, 128, "bfloat16")
    blocks = dataclasses.replace(tpu.blocks_for(None, 4096, 2), queries=256)
    tuning.save_rows("tpu", "TPU v5 lite", [{**first.row, **dataclasses.asdict(blocks)}], {})
    assert tpu.blocks_for("TPU v5 lite", 4096, 2) == blocks
    assert tpu.blocks_for("TPU v5", 4096, 2) == tpu.blocks_for(None, 4096, 2)
    assert tpu.blocks_for("TPU v6 lite", 4096, 2).queries == 1024, "a row of the library's for one kind of device"


@pytest.mark.parametrize("text", ["{", "[]", '{"platform": "tpu", "rows": []}', '{"platform": "cuda", "rows": [{}]}'])
def test_a_file_that_cannot_be_used_is_told_of_once(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "nvidia_h200.json").write_text(text)
    with pytest.warns(UserWarning, match=r"nvidia_h200.json is not used.*--save-tuning"):
        found = gpu.form_for(KIND, 512, 128, "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.form_for(KIND, 512, 128, "bfloat16") == found == gpu.form_for(None, 512, 128, "bfloat16")


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.ENVIRONMENT, "off")
    assert tuning.tuning_file(KIND) is None
    with pytest.raises(OSError, match=tuning.ENVIRONMENT):
        tuning.save_rows("cuda", KIND, [], {})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_queries", [32, 512])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_each_candidate_is_a_row_that_picks_it(num_queries: int, head_dim: int, dtype: str) -> None:
    for candidate in candidates("cuda", num_queries, head_dim, dtype):
        tuning.save_rows("cuda", KIND, [candidate.row], {})
        tuning._user_rows.cache_clear()
        form = gpu.form_for(KIND, num_queries, head_dim, dtype)
        assert {key: candidate.row[key] for key in dataclasses.asdict(form)} == dataclasses.asdict(form)
    assert candidates("cpu", num_queries, head_dim, dtype) == []
    assert shape_class("tpu", 129, head_dim, dtype)["max_queries"] == 0
