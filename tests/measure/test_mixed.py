"""`bicache benchmark --mixed`: what joining is worth, and that it changes nothing."""

from __future__ import annotations

import json

import golden
import pytest

from bicache_jax import BicacheError, load_model
from bicache_jax.cli import main
from bicache_jax.measure import mixed
from bicache_jax.measure.mixed import LENGTHS, mixed_requests


def test_requests_ask_for_many_lengths_over_shared_prefixes() -> None:
    config = load_model(golden.FOLDERS["llada"]).config
    found = mixed_requests(config, count=60, prefix=40, prefixes=3, threshold=0.9)
    assert {request.sampling.gen_length for request in found} == set(LENGTHS)
    assert len({request.prompt_ids[:40] for request in found}) == 3
    assert all(request.sampling.early_stop and request.sampling.threshold == 0.9 for request in found)
    with pytest.raises(BicacheError, match="longer than the model's"):
        mixed_requests(config, count=1, prefix=config.max_length, prefixes=1, threshold=None)


@pytest.mark.full
def test_rows_that_join_leave_fewer_places_idle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed, "LENGTHS", (32,))  # one program; rows stop early at random
    model = load_model(golden.FOLDERS["dream"])
    monkeypatch.setattr(mixed, "BLOCK", 8)
    flags = ["--mixed", "--policies", "none,bicache", "--prefix", "24", "--rows", "3", "--requests", "18", "--json"]
    flags += ["--boundary", "2", "--threshold", "0.2", "--repeats", "1", "--seconds", "1", "--quiet"]
    assert model.config.max_length >= 24 + 256
    assert main(["benchmark", "--model", str(golden.FOLDERS["dream"]), *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [result["policy"] for result in record["results"]] == ["none", "bicache"]
    for result in record["results"]:
        assert result["differ"] == 0 and result["requests"] == 18
        assert result["passes"][0] < result["passes"][2]
        assert result["own_waiting"] < result["own"] <= 1


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--requests", "4"], "go with --mixed"),
        (["--mixed", "--rows", "2,4"], "--rows: one value with --mixed"),
        (["--mixed", "--prefix", "9999"], "--prefix 9999"),
    ],
)
def test_faults_are_one_line(flags: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--random", "small", *flags]) == 2
    complaint = capsys.readouterr().err
    assert fault in complaint and complaint.count("\n") == 1
