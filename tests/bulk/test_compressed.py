"""Inputs that are compressed: the same results, progress by what is stored, and faults of the file in one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from fake_run import FakeSession, write_requests
from test_bulk import bucket  # noqa: F401

from bicache_jax.bulk.storage import Lines
from bicache_jax.bulk.windows import windows
from bicache_jax.cli import backend, main
from bicache_jax.core.types import Request


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path) -> bytes:
    """What is answered where the input is not compressed; there are two of it, one compressed in two parts."""
    monkeypatch.setattr(backend, "open_session", FakeSession)
    monkeypatch.chdir(tmp_path)
    data = write_requests(tmp_path / "a.jsonl", 40, n=2).read_bytes() + b"not json\n"
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "a.jsonl.gz").write_bytes(gzip.compress(data[:700]) + gzip.compress(data[700:]))
    assert main([*command("a.jsonl"), "--output", "plain"]) == 3
    return Path("plain/a.jsonl").read_bytes()


def command(source: str) -> list[str]:
    return ["batch", "--model", "x", "--input", source, "--window", "7", "--quiet"]


def test_results_are_those_of_the_plain_file_under_its_name(plain):
    run = [*command("gz/*.gz"), "--output", "out"]
    assert main(run) == 3
    assert sorted(path.name for path in Path("out").iterdir()) == ["_manifest.json", "_stats", "a.jsonl"]
    assert Path("out/a.jsonl").read_bytes().replace(b"gz/a.jsonl.gz", b"a.jsonl") == plain
    (stats,) = Path("out/_stats").iterdir()
    assert json.loads(stats.read_text().splitlines()[-1])["progress"] == 1.0
    assert main([*run, "--resume"]) == 3
    assert main([*run, "--shard", "1/2"]) == 0 and Path("out/a-00001-of-00002.jsonl").exists()


def test_results_are_those_of_the_plain_file_in_a_bucket(plain, bucket):  # noqa: F811
    (bucket / "in" / "a.jsonl.gz").write_bytes(Path("gz/a.jsonl.gz").read_bytes())
    run = [*command("s3://bucket/in/*"), "--output", "s3://bucket/out"]
    assert main(run) == 3
    assert (bucket / "out" / "a.jsonl").read_bytes().replace(b"s3://bucket/in/a.jsonl.gz", b"a.jsonl") == plain
    assert main([*run, "--resume"]) == 3


def test_progress_counts_stored_bytes_and_an_input_is_the_same_however_it_is_stored():
    stored = Path("gz/a.jsonl.gz")
    parse = lambda lines, source: (Request(str(number), (1,)) for number, _ in enumerate(lines))  # noqa: E731
    ends = [window.end for window in windows(stored, parse, 7)]
    assert ends == sorted(ends) and ends[-1] == stored.stat().st_size
    assert list(Lines(stored)) == list(Lines(Path("a.jsonl")))


@pytest.mark.parametrize(
    "damaged",
    [lambda data: data[:-12], lambda data: data[: len(data) // 2], lambda data: b"{}" + data, lambda data: data + b"x"],
    ids=["no end", "half", "no beginning", "more"],
)
def test_a_file_that_is_not_whole_is_one_line_and_leaves_no_output(damaged, capsys):
    source = Path("gz/a.jsonl.gz")
    source.write_bytes(damaged(source.read_bytes()))
    for run in ([*command(str(source)), "--output", "out"], ["generate", *command(str(source))[1:5], "--output", "o"]):
        assert main(run) == 2
        err = capsys.readouterr().err
        assert err.startswith("bicache: error: ") and err.count("\n") == 1
        assert f"--input {source}: not a whole gzip file" in err
    assert not Path("out/a.jsonl").exists() and not Path("o").exists()


def test_what_is_compressed_shows_by_its_first_bytes_too(plain):
    source = Path("gz/a.jsonl.gz").rename("gz/a.jsonl")
    assert main([*command(str(source)), "--output", "out"]) == 3
    assert Path("out/a.jsonl").read_bytes().replace(b"gz/a.jsonl", b"a.jsonl") == plain
    assert main(["generate", *command(str(source))[1:5], "--output", "o"]) == 3
    assert Path("o").read_bytes().replace(b"gz/a.jsonl", b"a.jsonl") == plain


def test_two_inputs_of_one_output_are_refused(capsys):
    assert main([*command("a.jsonl"), "--output", "out", "--input", "a.jsonl", "gz/a.jsonl.gz"]) == 2
    assert "names both a.jsonl and gz/a.jsonl.gz: results are named after files" in capsys.readouterr().err
