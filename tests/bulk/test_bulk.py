"""The parts of bulk inference: windows of a file, their division over workers, buckets."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import fsspec
import pytest
from etils import epath
from fake_run import FakeSession, write_requests
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from bicache_jax.bulk import state, window_journal
from bicache_jax.bulk.storage import inputs, path_of
from bicache_jax.bulk.windows import ahead, windows
from bicache_jax.cli import backend
from bicache_jax.core.types import BicacheError, Request

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import batch_inference  # noqa: E402

from bicache_jax.bulk import workers  # noqa: E402


class Endless(io.RawIOBase):
    """A file without end, of which little can be in memory."""

    def __init__(self) -> None:
        self.lines = 0

    def open(self, mode: str):
        return self

    def read(self, size: int = -1) -> bytes:
        return b"1\n"[:size]

    def seek(self, place: int, whence: int = 0) -> int:
        return 0

    def __iter__(self):
        while True:
            self.lines += 1
            yield b"%d\n" % self.lines

    def __str__(self):
        return "endless"


def test_a_window_is_all_that_is_read():
    file = Endless()
    parse = lambda lines, source: (Request(line.decode().strip(), (1,)) for line in lines)  # noqa: E731
    found = windows(file, parse, 5)
    first, second = next(found), next(found)
    assert file.lines == 10
    assert [item.id for item in second.requests.items] == ["6", "7", "8", "9", "10"]
    assert (first.end, second.end) == (10, 21)
    assert first.requests.digest != second.requests.digest
    assert next(windows(Endless(), parse, 5)).requests.digest == first.requests.digest
    seen = ahead(windows(file := Endless(), parse, 5))
    next(seen), next(seen)
    seen.close()
    assert file.lines <= 15  # the one in use and the one after it


class Bucket(MemoryFileSystem):
    """A bucket of the name space `s3://`, in memory."""

    protocol = ("s3",)
    store: dict = {}
    pseudo_dirs = [""]
    cachable = False
    find = AbstractFileSystem.find  # by listings

    def ls(self, path, detail=True, **kwargs):
        """Remembers listings whatever is written by then, unless it is told not to."""
        path = self._strip_protocol(path)
        found = self.dircache[path] if path in self.dircache else super().ls(path, detail=True)
        self.dircache[path] = found
        return found if detail else [entry["name"] for entry in found]

    @classmethod
    def _strip_protocol(cls, path):
        return f"/{path.removeprefix('s3://').strip('/')}".rstrip("/")


@pytest.fixture
def bucket(monkeypatch) -> epath.Path:
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    return path_of("s3://bucket")


@pytest.fixture(autouse=True)
def fake_run(monkeypatch) -> None:
    monkeypatch.setattr(backend, "open_session", FakeSession)


def run(model: str, *flags: str) -> int:
    command = ["--model", model, "--input", "s3://bucket/in/*.jsonl", "--output", "s3://bucket/out", "--window", "7"]
    return batch_inference.main([*command, *flags])


@pytest.mark.parametrize("upload", [0.0, 1e9])
def test_buckets_in_and_out_and_through_an_interruption(bucket, monkeypatch, tmp_path, capsys, upload):
    monkeypatch.setattr(window_journal, "UPLOAD_SECONDS", upload)
    files = [write_requests(tmp_path / "a.jsonl", 17, n=2), write_requests(tmp_path / "b.jsonl", 10)]
    for file in files:
        (bucket / "in" / file.name).write_bytes(file.read_bytes())
    assert [path.name for path in inputs(["s3://bucket/in/*.jsonl"])] == ["a.jsonl", "b.jsonl"]
    log = tmp_path / "log"
    assert run(f"interrupt=r9,log={log}") == 130
    kept = [path for path in Bucket.store if path.endswith(".journal")]
    assert len(kept) == 2  # a window that is done, and one that was under way
    assert run(f"log={log}") == 2
    assert "--resume" in capsys.readouterr().err
    assert run(f"log={log}", "--resume") == 0
    capsys.readouterr()
    assert len(log.read_text().split()) == 17 * 2 + 8 + 10
    names = {path.removeprefix("/bucket/out/") for path in Bucket.store if path.startswith("/bucket/out/")}
    assert names == {"a.jsonl", "b.jsonl", "_manifest.json", "_stats/00000-of-00001.jsonl"}
    ids = [json.loads(line)["id"] for line in (bucket / "out" / "b.jsonl").read_bytes().splitlines()]
    assert ids == [f"r{number}" for number in range(10)]
    samples = [json.loads(line)["sample"] for line in (bucket / "out" / "a.jsonl").read_bytes().splitlines()]
    assert samples == [sample for number in range(17) for sample in range(2 + number % 2)]
    stats = (bucket / "out" / "_stats" / "00000-of-00001.jsonl").read_bytes().splitlines()
    assert json.loads(stats[-1])["progress"] == 1.0


def test_a_bucket_that_is_not_there_is_one_line(bucket, capsys):
    assert run("x") == 2
    assert capsys.readouterr().err == "bicache: error: --input s3://bucket/in/*.jsonl: no such file\n"
    with pytest.raises(BicacheError, match="s3://nowhere/x: no such file"):
        inputs(["s3://nowhere/x"])


READ = dict.fromkeys(("a.jsonl", "a", "b"), ("digest of the input", 1))
IDENTITY = {"model": "x"}


def finished_state(output: state.AnyPath, number: int) -> state.State:
    """One of two workers, which has answered its request of the only window."""
    worker = state.State(str(output), [Path("a.jsonl")], state.Worker(number, 2), resume=True)
    worker.begin(IDENTITY)
    with worker.window("a.jsonl", 0, IDENTITY, 2) as journal:
        journal.add({"id": f"r{number}", "sample": 0, "finish_reason": "eos"}, index=number, of=1)
    return worker


def test_a_journal_that_vanishes_while_it_is_read_is_empty(tmp_path):
    """As that of a worker that closes a window in which it had nothing."""
    first = finished_state(tmp_path, 0)
    vanished = tmp_path / "_state" / "a.jsonl" / "000000.00001-of-00003.journal"
    vanished.symlink_to(tmp_path / "nothing")  # listed, and then not there
    second = finished_state(tmp_path, 1)
    with second.window("a.jsonl", 0, IDENTITY, 2) as journal:
        assert sorted(journal.finished) == [("r0", 0), ("r1", 0)]
    assert first.finish({"a.jsonl": [0]}, READ) == []
    assert second.finish({"a.jsonl": [0]}, READ) == [tmp_path / "a.jsonl"]
    assert len((tmp_path / "a.jsonl").read_bytes().splitlines()) == 2
    unreadable = tmp_path / "_state" / "a.jsonl" / "000000.00001-of-00003.journal"
    (tmp_path / "a.jsonl").unlink()
    unreadable.mkdir(parents=True)  # is there, but not to be read
    with pytest.raises(BicacheError, match="cannot write --output .*: Is a directory"):
        finished_state(tmp_path, 0)


def test_workers_on_a_bucket_see_what_others_have_just_written(bucket):
    first, second = (finished_state(bucket / "out", number) for number in range(2))
    assert first.finish({"a.jsonl": [0]}, READ) == []
    assert second.finish({"a.jsonl": [0]}, READ) == [bucket / "out" / "a.jsonl"]
    assert first.is_over() and len((bucket / "out" / "a.jsonl").read_bytes().splitlines()) == 2
    assert not [path for path in Bucket.store if "_state" in path]
    first.close()
    second.close()


def test_workers_that_could_not_see_each_other_finish(tmp_path, monkeypatch):
    """As on a network file system that remembers what was not there."""
    write_requests(tmp_path / "a.jsonl", 3)
    looks = [False, False, None, None, True]
    put_together = state.State._put_together

    def look(*args):
        if (found := looks.pop(0)) is None:
            raise BicacheError("busy")
        return found and put_together(*args)

    monkeypatch.setattr(state.State, "_put_together", look)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(workers, "POLLS", 5)
    overs = iter([True, False, True, True] * 10)  # a look that fails now and then
    is_over = state.State.is_over

    def may_fail(self):
        if next(overs):
            return is_over(self)
        raise BicacheError("busy")

    monkeypatch.setattr(state.State, "is_over", may_fail)
    command = ["--model", "x", "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--quiet"]
    assert batch_inference.main(command) == 0
    assert not looks and len((tmp_path / "out" / "a.jsonl").read_bytes().splitlines()) == 3


def test_of_two_that_put_outputs_together_one_can_die(tmp_path, monkeypatch):
    workers = [finished_state(tmp_path, number) for number in range(2)]
    assert workers[0].finish({"a.jsonl": [0]}, READ) == []
    whole = workers[1]._results

    def dies(name, numbers):
        yield next(whole(name, numbers))
        raise KeyboardInterrupt

    def slow(name, numbers):
        first, *rest = whole(name, numbers)
        yield first
        with pytest.raises(KeyboardInterrupt):
            workers[0].finish({"a.jsonl": [0]}, READ)
        assert not (tmp_path / "a.jsonl").exists()
        yield from rest

    monkeypatch.setattr(workers[0], "_results", dies)
    monkeypatch.setattr(workers[1], "_results", slow)
    assert workers[1].finish({"a.jsonl": [0]}, READ) == [tmp_path / "a.jsonl"]
    ids = [json.loads(line)["id"] for line in (tmp_path / "a.jsonl").read_bytes().splitlines()]
    assert ids == ["r0", "r1"] and {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "_manifest.json"}


def test_what_another_writes_and_removes_meanwhile_is_not_written_over(bucket, monkeypatch):
    """An earlier run's error is in one journal, and the answer in one that is removed while others are read."""
    first, second = (
        state.State("s3://bucket/out", [Path(n) for n in "ab"], state.Worker(i, 2), resume=True) for i in (0, 1)
    )
    first.begin(IDENTITY)
    for name in "ab":
        with first.window(name, 0, IDENTITY, 1) as journal:
            journal.add({"id": "r0", "sample": 0, "finish_reason": "error"}, index=0, of=1)
        with second.window(name, 0, IDENTITY, 1) as journal:
            journal.add({"id": "r0", "sample": 0, "finish_reason": "eos"}, index=0, of=1)
    state.write_whole(second._done(1), [b"done"])
    results = state.State._results

    def overtaken(self, name, numbers):
        monkeypatch.setattr(state.State, "_results", results)
        assert second.finish({"a": [0], "b": [0]}, READ) == [bucket / "out" / name for name in "ab"]
        for journal in ("a", "b"):  # all but one of them are gone
            state.write_whole(bucket / "out" / "_state" / journal / "000000.00000-of-00002.journal", [error])
        yield from results(self, name, numbers)

    error = (bucket / "out" / "_state" / "a" / "000000.00000-of-00002.journal").read_bytes()
    monkeypatch.setattr(state.State, "_results", overtaken)
    assert len(first.finish({"a": [0], "b": [0]}, READ)) == 2
    for name in "ab":
        assert json.loads((bucket / "out" / name).read_bytes())["finish_reason"] == "eos"
    first.close()
    second.close()


@pytest.mark.parametrize("place", ["disk", "bucket"])
@pytest.mark.parametrize("method", ["_begin", "_open", "_results"])
def test_outputs_that_another_completes_meanwhile(tmp_path, bucket, monkeypatch, method, place):
    """What was done before a restart can be all that is needed, and whoever notices first removes the state."""
    output = {"disk": tmp_path, "bucket": bucket}[place] / "out"
    write_requests(tmp_path / "a.jsonl", 3)
    original = getattr(state.State, method)

    def overtaken(self, *args):
        (output / "a.jsonl").write_bytes(b"whole\n")
        state.remove_folder(output / "_state")
        return original(self, *args)

    monkeypatch.setattr(state.State, method, overtaken)
    command = ["--model", "x", "--input", str(tmp_path / "a.jsonl"), "--output", str(output), "--quiet"]
    assert batch_inference.main(command) == 0
    assert (output / "a.jsonl").read_bytes() == b"whole\n"
    assert not (tmp_path / "out" / "_state").exists() and not [path for path in Bucket.store if "_state" in path]
    stats = json.loads((output / "_stats" / "00000-of-00001.jsonl").read_bytes().splitlines()[-1])
    assert stats["results"] == (3 if method == "_results" else 0)  # what is done is not begun again


def test_statistics_that_cannot_be_written_cost_no_result(tmp_path, capsys):
    write_requests(tmp_path / "a.jsonl", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_stats").write_text("a file")
    command = ["--model", "x", "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--window", "1"]
    assert batch_inference.main([*command, "--quiet"]) == 0
    assert len((tmp_path / "out" / "a.jsonl").read_bytes().splitlines()) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bicache: warning: statistics are not kept: cannot write ") and "_stats" in line


@pytest.mark.parametrize("kind", [RuntimeError, OSError])
def test_a_bucket_may_fail_at_any_call(bucket, monkeypatch, tmp_path, capsys, kind):
    """That is one line, of whatever kind the library's exception is, and the next run gets through."""
    source = write_requests(tmp_path / "a.jsonl", 3)
    calls, failing = 0, 0

    def may_fail(original):
        def method(*args, **more):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise kind("503: busy\nlater")
            return original(*args, **more)

        return method

    def answer(*flags: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            for name in ("_open", "info", "ls", "rm_file", "find", "glob", "put_file"):
                patch.setattr(Bucket, name, may_fail(getattr(Bucket, name)))
            return run("x", "--quiet", *flags), capsys.readouterr().err

    expected, status, said = b"", 2, ""
    while failing <= calls:  # the last turn is one in which nothing fails
        Bucket.store.clear()
        (bucket / "in" / source.name).write_bytes(source.read_bytes())
        calls, failing = 0, failing + 1
        status, said = answer()
        assert (status, said.count("\n")) in ((0, 0), (0, 1), (2, 1)), said
        assert not said or said.endswith(": 503: busy\n")
        assert status == 0 or answer("--resume") == (0, "")
        found = (bucket / "out" / source.name).read_bytes()
        assert found == (expected := expected or found)
    assert (status, said) == (0, "") and failing > 20 and len(expected.splitlines()) == 3


def test_names_with_wildcards_in_them_are_names(bucket, tmp_path, capsys):
    source = write_requests(tmp_path / "a.jsonl", 3)
    for folder in ("day1", "day2"):
        (bucket / "in[1]" / folder / f"{folder}[0].jsonl").write_bytes(source.read_bytes())
    names = ["s3://bucket/in[[]1]/day*/*.jsonl", "s3://bucket/in[1]/day1/day1[0].jsonl"]
    assert [path.name for path in inputs(names)] == ["day1[0].jsonl", "day2[0].jsonl"]
    for name in ("s3://bucket/**/x.jsonl", "s3://b*/x.jsonl"):
        with pytest.raises(BicacheError, match="on buckets .* does not work"):
            inputs([name])
    (bucket / "out1" / "_state" / "00000-of-00001.done").write_bytes(b"another job's")
    command = ["--model", "x", "--quiet", "--input", names[0], "--output", "s3://bucket/out[1]", "--resume"]
    assert batch_inference.main([*command, "--window", "2"]) == 0, capsys.readouterr().err
    names = {path.removeprefix("/bucket/") for path in Bucket.store if path.startswith("/bucket/out")}
    assert names - {"out[1]/_stats/00000-of-00001.jsonl", "out[1]/_manifest.json"} == {
        "out1/_state/00000-of-00001.done",
        *(f"out[1]/{folder}[0].jsonl" for folder in ("day1", "day2")),
    }
    assert len((bucket / "out[1]" / "day2[0].jsonl").read_bytes().splitlines()) == 3


def test_colons_in_names_are_of_the_name(bucket, tmp_path):
    source = write_requests(tmp_path / "a.jsonl", 3)
    (bucket / "in" / "a::b.jsonl").write_bytes(source.read_bytes())
    command = ["--model", "x", "--quiet", "--input", "s3://bucket/in/*", "--output", "s3://bucket/run::1"]
    assert batch_inference.main(command) == 0
    names = {path for path in Bucket.store if not path.startswith("/bucket/in/")}
    made = ("a::b.jsonl", "_manifest.json", "_stats/00000-of-00001.jsonl")
    assert names == {f"/bucket/run::1/{name}" for name in made}


def test_workers_whose_inputs_differ_are_told(tmp_path):
    first, second = (state.State(str(tmp_path), [Path("a.jsonl")], state.Worker(n, 2), resume=True) for n in range(2))
    first.begin(IDENTITY)
    with (
        first.window("a.jsonl", 0, {"input": "x"}, 2) as here,
        second.window("a.jsonl", 0, {"input": "y"}, 2) as there,
    ):
        here.add({"id": "r0", "sample": 0, "finish_reason": "eos"}, index=0, of=1)
        there.add({"id": "r1", "sample": 0, "finish_reason": "eos"}, index=1, of=1)
    assert first.finish({"a.jsonl": [0]}, READ) == []
    with pytest.raises(BicacheError, match='input was "y" and is "x" now'):
        second.finish({"a.jsonl": [0]}, READ)
    assert not (tmp_path / "a.jsonl").exists()


def test_a_disk_that_is_full_when_it_is_synced_is_one_line(tmp_path, monkeypatch, capsys):
    write_requests(tmp_path / "a.jsonl", 3)
    command = ["--model", "x", "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--quiet"]
    syncs = told = 0
    sync = os.fsync

    def full(file):
        nonlocal syncs
        syncs += 1
        if syncs == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr("bicache_jax.bulk.journal.os.fsync", full)
    for failing in range(1, 20):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        syncs = 0
        status = batch_inference.main(command)
        if syncs < failing:
            break
        said = capsys.readouterr().err
        if status or said:  # else the fault came when the output was there already
            assert (status, said.count("\n")) == (2, 1) and said.endswith(": No space left on device\n"), said
            assert batch_inference.main([*command, "--resume"]) == 0
            told += 1
        assert len((tmp_path / "out" / "a.jsonl").read_bytes().splitlines()) == 3
    assert status == 0 and told >= 4
