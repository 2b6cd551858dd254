"""The parts of bulk inference: windows of a file, their division over workers, buckets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fsspec
import pytest
from etils import epath
from fake_run import FakeRun, write_requests
from fsspec.implementations.memory import MemoryFileSystem

from bicache_jax.bulk import state
from bicache_jax.bulk.storage import inputs
from bicache_jax.bulk.windows import ahead, windows
from bicache_jax.cli import backend
from bicache_jax.types import BicacheError, Request

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import batch_inference  # noqa: E402


class Endless:
    """A file without end, of which little can be in memory."""

    def __init__(self) -> None:
        self.read = 0

    def open(self, mode: str):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def __iter__(self):
        while True:
            self.read += 1
            yield b"%d\n" % self.read

    def __str__(self):
        return "endless"


def test_a_window_is_all_that_is_read():
    file = Endless()
    parse = lambda lines, source: (Request(line.decode().strip(), (1,)) for line in lines)  # noqa: E731
    found = windows(file, parse, 5)
    first, second = next(found), next(found)
    assert file.read == 10
    assert [item.id for item in second.requests.items] == ["6", "7", "8", "9", "10"]
    assert (first.end, second.end) == (10, 21)
    assert first.requests.digest != second.requests.digest
    assert next(windows(Endless(), parse, 5)).requests.digest == first.requests.digest
    seen = ahead(windows(file := Endless(), parse, 5))
    next(seen), next(seen)
    seen.close()
    assert file.read <= 15  # the one in use and the one after it


class Bucket(MemoryFileSystem):
    """A bucket of the name space `s3://`, in memory."""

    protocol = ("s3",)
    store: dict = {}
    pseudo_dirs = [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol("memory://" + path.removeprefix("s3://").lstrip("/"))


@pytest.fixture
def bucket(monkeypatch) -> epath.Path:
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.store.clear()
    return epath.Path("s3://bucket")


def run(monkeypatch, model: str, *flags: str) -> int:
    monkeypatch.setattr(backend, "Run", FakeRun)
    command = ["--model", model, "--input", "s3://bucket/in/*.jsonl", "--output", "s3://bucket/out", "--window", "7"]
    return batch_inference.main([*command, *flags])


@pytest.mark.parametrize("upload", [0.0, 1e9])
def test_buckets_in_and_out_and_through_an_interruption(bucket, monkeypatch, tmp_path, capsys, upload):
    monkeypatch.setattr(state, "UPLOAD_SECONDS", upload)
    files = [write_requests(tmp_path / "a.jsonl", 17, n=2), write_requests(tmp_path / "b.jsonl", 10)]
    for file in files:
        (bucket / "in" / file.name).write_bytes(file.read_bytes())
    assert [path.name for path in inputs(["s3://bucket/in/*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    log = tmp_path / "log"
    assert run(monkeypatch, f"interrupt=r9,log={log}") == 130
    kept = [path for path in Bucket.store if path.endswith(".journal")]
    assert len(kept) == 2  # a window that is done, and one that was under way
    assert run(monkeypatch, f"log={log}") == 2
    assert "--resume" in capsys.readouterr().err
    assert run(monkeypatch, f"log={log}", "--resume") == 0
    capsys.readouterr()
    assert len(log.read_text().split()) == 17 * 2 + 8 + 10
    names = {path.removeprefix("/bucket/out/") for path in Bucket.store if path.startswith("/bucket/out/")}
    assert names == {"a.jsonl", "b.jsonl", "_stats/00000-of-00001.jsonl"}
    ids = [json.loads(line)["id"] for line in (bucket / "out" / "b.jsonl").read_bytes().splitlines()]
    assert ids == [f"r{number}" for number in range(10)]
    samples = [json.loads(line)["sample"] for line in (bucket / "out" / "a.jsonl").read_bytes().splitlines()]
    assert samples == [sample for number in range(17) for sample in range(2 + number % 2)]
    stats = (bucket / "out" / "_stats" / "00000-of-00001.jsonl").read_bytes().splitlines()
    assert json.loads(stats[-1])["progress"] == 1.0


def test_a_bucket_that_is_not_there_is_one_line(bucket, monkeypatch, capsys):
    assert run(monkeypatch, "x") == 2
    assert capsys.readouterr().err == "bicache: error: --input s3://bucket/in/*.jsonl: no such file\n"
    with pytest.raises(BicacheError, match="s3://nowhere/x: no such file"):
        inputs(["s3://nowhere/x"])
