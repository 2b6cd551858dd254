"""`scripts/batch_inference.py` with a stand-in for the engine: killed, stopped, divided and restarted at will."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_run import write_requests

HERE = Path(__file__).parents[1]
FAKE = [sys.executable, str(HERE / "fake_batch.py")]


def start(output: Path | str, requests: list, *flags: str, worker: str = "0/1", wait: float = 0, log: Path | str = ""):
    """Starts a worker."""
    model = f"wait={wait},worker={worker}" + (f",log={log}" if log else "")
    command = [
        *FAKE,
        "--model",
        model,
        "--input",
        *map(str, requests),
        "--output",
        str(output),
        "--window",
        "7",
        *flags,
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, errors = process.communicate()
    return process.returncode, out + errors


def expected(requests: Path) -> bytes:
    """What `bicache generate` writes."""
    output = requests.with_suffix(".expected")
    command = [sys.executable, str(HERE / "fake_run.py"), "generate", "--model", "x", "--quiet"]
    subprocess.run([*command, "--input", str(requests), "--output", str(output)])
    return output.read_bytes()


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two inputs of several windows each, with samples and bad lines."""
    paths = [write_requests(tmp_path / "a.jsonl", 17, n=2), write_requests(tmp_path / "b.jsonl", 10)]
    with paths[1].open("a") as file:
        file.write('not json\n\n{"id": "r3", "prompt": "again"}\n{"prompt": "no id"}\n')
    return paths


def check(output: Path, files: list[Path]) -> None:
    for path in files:
        assert (output / path.name).read_bytes() == expected(path)
    names = sorted(path.name for path in output.iterdir())
    assert names == ["_manifest.json", "_stats", *(path.name for path in files)]


def test_outputs_are_those_of_generate_and_statistics_are_json(tmp_path, files):
    status, errors = finish(start(tmp_path / "out", [tmp_path / "?.jsonl"], "--report-seconds", "1"))
    assert status == 3  # there are bad lines
    check(tmp_path / "out", files)
    assert "100.0% of the input" in errors and "complete: " in errors
    (stats,) = (tmp_path / "out" / "_stats").iterdir()
    last = json.loads(stats.read_text().splitlines()[-1])
    assert last["progress"] == 1.0 and last["results"] == 17 * 2 + 8 + 11 and last["forward_passes"] == 7
    status, _ = finish(start(tmp_path / "out", files, "--resume"))
    assert status == 3  # nothing is left to do, and some lines are bad
    check(tmp_path / "out", files)


def test_kills_of_any_worker_at_any_moment_lose_and_double_nothing(tmp_path, files):
    """Kills workers at random moments, restarts them, now as two, now as three, until they get through."""
    output, log = tmp_path / "out", tmp_path / "log"
    chance = random.Random(0)
    kills, kept = 0, 0
    count = 2
    while True:
        begin = {"wait": 0.1, "log": log}
        workers = [start(output, files, "--resume", worker=f"{i}/{count}", **begin) for i in range(count)]
        deadline = time.monotonic() + chance.uniform(0.3, 1.0) * (1 + kills / 10)
        while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
            time.sleep(0.01)
        late = [worker for worker in workers if worker.poll() is None]
        for worker in chance.sample(late, len(late)):
            worker.kill()
        results = [finish(worker) for worker in workers]
        assert all(status in (0, 3, -signal.SIGKILL) for status, _ in results), results
        if not late:
            break
        kills += len(late)
        if not all((output / path.name).exists() for path in files):  # else the state may be gone, or half of it
            journals = (output / "_state").rglob("*.journal")
            lines = [line for path in journals for line in path.read_bytes().split(b"\n")[1:] if line.endswith(b"}")]
            assert len(lines) >= kept  # nothing finished is ever lost
            kept = len(lines)
        count = chance.choice([1, 2, 3])
    assert kills >= 4
    check(output, files)
    made = log.read_text().split()
    # A kill can only cost the result that was finished but not yet written. Ids repeat over the two files.
    whole = 17 * 2 + 8 + 11
    assert whole <= len(made) <= whole + kills


def test_sigterm_keeps_what_is_finished_says_what_remains_and_exits_0(tmp_path, files):
    output, log = tmp_path / "out", tmp_path / "log"
    process = start(output, files, wait=0.05, log=log)
    while not log.exists() or len(log.read_text().split()) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    assert status == 0
    (line,) = [line for line in errors.splitlines() if "SIGTERM" in line]
    done = len(log.read_text().split())
    assert f"{17 - done} of this worker's 17 results in window 0 of a.jsonl remain" in line or done > 17
    assert "% of the input after it" in line and "--resume" in line
    assert not (output / "a.jsonl").exists()
    status, errors = finish(start(output, files))
    assert status == 2 and "--resume" in errors and errors.count("\n") == 1
    status, errors = finish(start(output, files, "--resume", "--seed", "5"))
    assert status == 2 and "seed was 0 and is 5 now" in errors
    status, errors = finish(start(output, files, "--resume", "--window", "9"))
    assert status == 2 and "window was 7 and is 9 now" in errors
    assert finish(start(output, files, "--resume", log=log))[0] == 3
    check(output, files)
    assert len(log.read_text().split()) == 17 * 2 + 8 + 11


def test_sigterm_while_others_are_at_work(tmp_path, files):
    output = tmp_path / "out"
    process = start(output, files, "--stopped-status", "143", worker="0/2")
    while not list((output / "_state").glob("*.done")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    assert status == 143 and "something of others' does" in errors
    workers = [start(output, files, "--resume", "--errors-status", "0", worker=f"{i}/2") for i in range(2)]
    assert [finish(worker)[0] for worker in workers] == [0, 0]
    check(output, files)


def test_a_changed_input_is_noticed(tmp_path, files):
    output, log = tmp_path / "out", tmp_path / "log"
    process = start(output, files, wait=0.05, log=log)
    while not log.exists() or len(log.read_text().split()) < 3:
        time.sleep(0.01)
    process.kill()
    finish(process)
    files[0].write_text(files[0].read_text().replace("prompt 2", "another"))
    status, errors = finish(start(output, files, "--resume"))
    assert status == 2 and "input was" in errors and errors.count("\n") == 1


def test_slices_are_independent_and_make_up_the_whole(tmp_path, files):
    output = tmp_path / "out"
    for part in range(3):
        status, errors = finish(start(output, files, "--shard", f"{part}/3"))
        assert status == (3 if part == 0 else 0), errors  # bad lines are in the first slice
    for path in files:
        whole = expected(path).splitlines()
        parts = [(output / f"{path.stem}-0000{part}-of-00003.jsonl").read_bytes().splitlines() for part in range(3)]
        assert sorted(sum(parts, [])) == sorted(whole)
        assert all(part == [line for line in whole if line in part] and part for part in parts)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "3/3"], "I/N"),
        (["--window", "0"], "integer >= 1"),
        (["--threshold", "7"], "from 0 to 1"),
        (["--model", "missing"], "missing: no such folder"),
    ],
)
def test_faults_are_one_line(tmp_path, files, flags, message):
    status, errors = finish(start(tmp_path / "out", files, *flags))
    assert status == 2 and message in errors and errors.count("\n") == 1 and errors.startswith("bicache: error: ")


def test_inputs_that_cannot_be(tmp_path, files):
    (tmp_path / "more").mkdir()
    twin = write_requests(tmp_path / "more" / "a.jsonl", 1)
    for names, message in (
        ([tmp_path / "nothing*"], "no such file"),
        ([tmp_path], "is a folder"),
        ([files[0], twin], "results are named after files"),
    ):
        status, errors = finish(start(tmp_path / "out", names))
        assert status == 2 and message in errors and errors.count("\n") == 1


def test_dry_run_shows_the_division(tmp_path, files):
    status, out = finish(start(tmp_path / "out", files, "--dry-run", worker="0/2"))
    assert status == 0 and "first 7 requests" in out and "requests of each worker: [" in out
    assert not (tmp_path / "out").exists()
