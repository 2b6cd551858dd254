"""The journal: nothing finished is lost, nothing is computed or written twice, and no run takes another's results."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_run import write_requests

from bicache_jax.bulk.journal import Journal, dump, journal_path, write_atomic
from bicache_jax.core.types import BicacheError

RUN = {"model": "abc", "policy": "bicache", "steps": 8, "table": {"0": 1}}
FAKE = [sys.executable, str(Path(__file__).parents[1].joinpath("fake_run.py")), "generate"]


def record(name: str, sample: int = 0, text: str = "t") -> dict:
    return {"id": name, "sample": sample, "text": text, "finish_reason": "length"}


def begin(path: Path, run: dict = RUN, resume: bool = False) -> Journal:
    journal = Journal(path, resume=resume)
    journal.begin(run)
    return journal


@pytest.fixture
def path(tmp_path):
    return journal_path(tmp_path / "out.jsonl")


def test_resume_takes_in_what_is_there_and_appends(path):
    first = [record("a"), record("b", 1, "line\u2028separator\nand \x85")]
    with begin(path) as journal:
        for each in first:
            journal.add(each)
    with begin(path, resume=True) as journal:
        assert list(journal.finished.values()) == first
        journal.add(record("c"))
    with begin(path, resume=True) as journal:
        assert list(journal.finished) == [("a", 0), ("b", 1), ("c", 0)]


@pytest.mark.parametrize("cut", range(1, 40))
def test_torn_last_line_costs_that_line_only(path, cut):
    with begin(path) as journal:
        journal.add(record("a"))
        journal.add(record("b"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with begin(path, resume=True) as journal:
        assert list(journal.finished) == [("a", 0)]
        journal.add(record("b"))
    assert path.read_bytes() == whole


def test_garbled_line_in_the_middle_costs_that_line_only(path):
    with begin(path) as journal:
        for name in "abc":
            journal.add(record(name))
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\0" * len(lines[2])
    path.write_bytes(b"\n".join(lines))
    with begin(path, resume=True) as journal:
        assert list(journal.finished) == [("a", 0), ("c", 0)]


def test_existing_results_are_never_lost_silently(path):
    with begin(path) as journal:
        journal.add(record("a"))
    before = path.read_bytes()
    with pytest.raises(BicacheError, match=r"out\.jsonl\.journal holds 1 finished.*--resume.*--overwrite"):
        Journal(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 16}, "steps was 8 and is 16 now"),
        ({"model": "xyz"}, 'model was "abc" and is "xyz" now'),
        ({"table": {"0": 2}}, 'table was {"0": 1} and is {"0": 2} now'),
        ({"new": 1}, "new was absent and is 1 now"),
    ],
)
def test_another_runs_journal_is_refused_and_kept(path, change, message):
    with begin(path) as journal:
        journal.add(record("a"))
    before = path.read_bytes()
    with pytest.raises(BicacheError, match=message), Journal(path, resume=True) as journal:
        journal.begin({**RUN, **change})
    assert path.read_bytes() == before


def test_another_format_is_refused(path):
    with begin(path) as journal:
        journal.add(record("a"))
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 99', 1))
    with pytest.raises(BicacheError, match="format 99"):
        begin(path, resume=True)


@pytest.mark.parametrize("content", [b"my own notes\n", b"notes without end", b'{"id": "a"}\n', b"\xff\xfe\n"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_that_is_no_journal_is_left_alone(path, content, resume):
    path.write_bytes(content)
    with pytest.raises(BicacheError, match="is not a journal"):
        Journal(path, resume=resume)
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 5, 30, None])
def test_a_journal_without_results_is_no_obstacle(path, size):
    journal = begin(path, {"model": "other"})
    journal._file.close()  # as a kill leaves it: header written, no result
    path.write_bytes(path.read_bytes()[:size])
    with begin(path) as journal:
        journal.add(record("a"))
    with begin(path, resume=True) as journal:
        assert list(journal.finished) == [("a", 0)]


def test_a_run_without_results_leaves_no_journal(path):
    with begin(path):
        assert path.exists()
    assert not path.exists()


def test_two_runs_cannot_share_a_journal(path):
    with begin(path) as journal, pytest.raises(BicacheError, match="in use"):
        journal.add(record("a"))
        Journal(path, resume=True)


def test_unwritable_folder_is_a_clear_error(tmp_path):
    with pytest.raises(BicacheError, match="cannot write .*No such file"):
        Journal(tmp_path / "nowhere" / "out.jsonl.journal")


def test_write_atomic_replaces_or_leaves(tmp_path):
    target, link = tmp_path / "out", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)

    def failing():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(link, failing())
    assert target.read_text() == "old"
    write_atomic(link, [b"new\n", b"lines\n"])
    assert target.read_text() == "new\nlines\n"
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_dump_keeps_text_readable_and_survives_lone_surrogates():
    assert dump({"text": "日本"}) == '{"text": "日本"}\n'.encode()
    assert json.loads(dump({"id": "\ud800"})) == {"id": "\ud800"}


def run_fake(output: Path, requests: Path, *flags: str, wait: float, log: Path, deaf: str = "") -> subprocess.Popen:
    model = f"wait={wait},log={log},deaf={deaf}"
    command = [*FAKE, "--model", model, "--input", str(requests), "--output", str(output), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, errors


def wait_for_results(output: Path, count: int) -> None:
    while not journal_path(output).exists() or journal_path(output).read_bytes().count(b"\n") <= count:
        time.sleep(0.01)


def test_kill_at_any_moment_loses_and_doubles_nothing(tmp_path):
    """Kills the command again and again at random moments, until a run gets through."""
    requests = write_requests(tmp_path / "in.jsonl", 12, n=2)
    whole, log = tmp_path / "whole.jsonl", tmp_path / "log"
    assert finish(run_fake(whole, requests, wait=0, log=tmp_path / "other"))[0] == 0
    output = tmp_path / "out.jsonl"
    chance = random.Random(0)
    kills, before = 0, 0
    while True:
        process = run_fake(output, requests, "--resume", wait=0.05, log=log)
        try:
            # Ever later, so that a machine on which the start alone takes long gets through as well.
            _, errors = process.communicate(timeout=chance.uniform(0.05, 0.4) * (1 + kills / 10))
        except subprocess.TimeoutExpired:
            process.kill()
            finish(process)
            kills += 1
            if output.exists():  # killed between the rename and the end: nothing was left to lose
                journal_path(output).unlink(missing_ok=True)
                break
            lines = journal_path(output).read_bytes().split(b"\n") if journal_path(output).exists() else [b""]
            kept = sum(line.endswith(b"}") for line in lines[1:])
            assert kept >= before  # nothing finished is ever lost
            before = kept
            continue
        assert process.returncode == 0, errors
        break
    assert kills >= 3
    assert output.read_bytes() == whole.read_bytes()
    assert not journal_path(output).exists()
    # A kill can only cost the result that was finished but not yet written, so at most one per kill is made twice.
    made = log.read_text().split()
    assert len(set(made)) == 30
    assert len(made) - len(set(made)) <= kills


def test_kill_between_rename_and_removal_of_the_journal(tmp_path):
    requests = write_requests(tmp_path / "in.jsonl", 5)
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    process = run_fake(output, requests, wait=0.2, log=log)
    wait_for_results(output, 3)
    process.kill()
    finish(process)
    kept = journal_path(output).read_bytes()
    assert finish(run_fake(output, requests, "--resume", wait=0, log=log))[0] == 0
    first = output.read_bytes()
    journal_path(output).write_bytes(kept)
    assert finish(run_fake(output, requests, "--resume", wait=0, log=log))[0] == 0
    assert output.read_bytes() == first


def test_interrupt_ends_a_run_that_is_deaf_to_it_and_says_how_to_go_on(tmp_path):
    requests = write_requests(tmp_path / "in.jsonl", 30)
    output, log = tmp_path / "out.jsonl", tmp_path / "log"
    process = run_fake(output, requests, wait=0.01, log=log, deaf="r15")
    wait_for_results(output, 14)
    process.send_signal(signal.SIGINT)
    status, errors = finish(process)
    assert status == 130
    assert len(errors.splitlines()) == 1
    assert "--resume" in errors and str(journal_path(output)) in errors
    process = run_fake(output, requests, wait=0, log=log)
    status, errors = finish(process)
    assert status == 2 and "--resume" in errors
    process = run_fake(output, requests, "--resume", "--seed", "5", wait=0, log=log)
    status, errors = finish(process)
    assert status == 2 and "seed was 0 and is 5 now" in errors and len(errors.splitlines()) == 1
    assert finish(run_fake(output, requests, "--resume", wait=0, log=log))[0] == 0
    assert [json.loads(line)["id"] for line in output.read_bytes().splitlines()] == [f"r{i}" for i in range(30)]
    assert len(log.read_text().split()) == 30


def test_interrupt_before_the_first_result_leaves_no_journal(tmp_path):
    requests = write_requests(tmp_path / "in.jsonl", 3)
    output = tmp_path / "out.jsonl"
    process = run_fake(output, requests, wait=0, log=tmp_path / "log", deaf="r2")
    wait_for_results(output, 0)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "bicache: interrupted; no result was finished\n")
    assert os.listdir(tmp_path) == ["in.jsonl"]
