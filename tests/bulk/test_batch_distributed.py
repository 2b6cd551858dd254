"""`scripts/batch_inference.py` in several `jax.distributed` processes on loopback, on the real engine."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden import FOLDERS

from bicache_jax.cli import main

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "batch_inference.py")
FLAGS = ["--model", str(FOLDERS["llada"]), "--boundary", "2", "--refresh-interval", "1", "--gen-length", "4"]
FLAGS += ["--steps", "2", "--temperature", "0.7", "--seed", "3", "--batch-size", "64"]


def write_input(path: Path, requests: int, prefixes: int) -> Path:
    """Short requests that share prefixes, shuffled, and a few bad lines."""
    chance = random.Random(0)
    shared = [[chance.randrange(300) for _ in range(chance.randint(16, 18))] for _ in range(prefixes)]
    lines = []
    for number in range(requests):
        prefix = shared[number % prefixes]
        fields = {"id": f"q{number}", "prompt_ids": [*prefix, *(chance.randrange(300) for _ in range(2))]}
        if number % 501 == 500:
            fields["prompt_ids"][0] = 10**6
        lines.append(json.dumps(fields))
    chance.shuffle(lines)
    path.write_text("\n".join(lines) + "\n")
    return path


class Pod:
    """Processes that run the same command."""

    def __init__(self, source: Path, output: Path, size: int, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.output = output
        command = [sys.executable, SCRIPT, *FLAGS, "--input", str(source), "--output", str(output)]
        command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(size), "--heartbeat-seconds", "10"]
        command += ["--leave-seconds", "300"]  # intervals take long where tests share a machine
        self.processes = [
            subprocess.Popen(
                [*command, "--process-id", str(rank), *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]

    def results(self, rank: int | None = None) -> int:
        """Results in the journals."""
        pattern = "*.journal" if rank is None else f"*.{rank:05d}-of-*.journal"
        journals = list((self.output / "_state").rglob(pattern)) if (self.output / "_state").exists() else []
        return sum(path.read_bytes().count(b"\n") - 1 for path in journals if path.exists())

    def wait_for(self, results: int, rank: int | None = None) -> None:
        """Waits until so many more results are there."""
        before = self.results(rank)
        while self.results(rank) < before + results:
            for process in self.processes:
                assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)

    def join(self) -> list[tuple[int, str]]:
        """Waits for all; returns exit status and output of each."""
        outputs = [process.communicate()[0] for process in self.processes]
        return [(process.returncode, output) for process, output in zip(self.processes, outputs, strict=True)]


def undisturbed(source: Path, folder: Path) -> bytes:
    """The results of one process that nothing happens to."""
    output = folder / "expected.jsonl"
    command = ["generate", *FLAGS, "--no-compilation-cache", "--quiet"]
    assert main([*command, "--input", str(source), "--output", str(output)]) == 3
    return output.read_bytes()


def run_killed_and_stopped(source: Path, output: Path, size: int, window: int, victim: int, some: int) -> list[int]:
    """Kills one process of a run, sends all of the next one SIGTERM, and lets the third go to its end."""
    counts = []
    flags = ["--window", str(window), "--resume"]
    pod = Pod(source, output, size, *flags)
    pod.wait_for(some, victim)
    pod.processes[victim].send_signal(signal.SIGKILL)
    for rank, (status, said) in enumerate(pod.join()):
        assert status != 0, said
        # Jax ends the others when it misses one of them, and says why.
        assert rank == victim or "task" in said and ("heartbeat" in said or "unavailable" in said.lower()), said
    counts.append(pod.results())

    pod = Pod(source, output, size, *flags)
    pod.wait_for(some)
    for process in pod.processes:
        process.send_signal(signal.SIGTERM)
    for status, said in pod.join():
        assert status == 0 and "stopped by SIGTERM" in said and "remain" in said, said
    counts.append(pod.results())
    assert not (output / source.name).exists()

    pod = Pod(source, output, size, *flags)
    ends = pod.join()
    assert {status for status, _ in ends} <= {0, 3} and any(status == 3 for status, _ in ends), ends  # bad lines
    return counts


@pytest.mark.full
def test_two_processes_killed_and_stopped_end_in_the_bytes_of_one_undisturbed(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 2000, 100)
    expected = undisturbed(source, tmp_path)
    output = tmp_path / "out"
    killed, stopped = run_killed_and_stopped(source, output, 2, 2000, victim=1, some=200)
    assert 200 <= killed < stopped < 2000
    assert (output / source.name).read_bytes() == expected
    assert sorted(path.name for path in output.iterdir()) == ["_manifest.json", "_stats", source.name]
    lines = (output / "_stats" / "00000-of-00002.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["progress"] == 1.0 and last["results_resumed"] > 0
    prefixes = sum(
        json.loads(path.read_text().splitlines()[-1])["prefixes_encoded"] for path in (output / "_stats").iterdir()
    )
    assert prefixes <= 110  # a prefix is encoded on one worker, but for a group that was split


@pytest.mark.slow
@pytest.mark.full
def test_four_processes_and_more_requests(tmp_path: Path) -> None:
    """Also windows smaller than the input, another victim (process 0, which all others depend on), and figures."""
    requests, prefixes, size = 3000, 150, 4
    source = write_input(tmp_path / "in.jsonl", requests, prefixes)
    started = time.monotonic()
    expected = undisturbed(source, tmp_path)
    alone = time.monotonic() - started
    output = tmp_path / "out"
    started = time.monotonic()
    killed, stopped = run_killed_and_stopped(source, output, size, 2000, victim=0, some=150)
    assert (output / source.name).read_bytes() == expected
    stats = [path.read_text().splitlines()[-1] for path in sorted((output / "_stats").iterdir())]
    figures = {
        "requests": requests,
        "prefixes": prefixes,
        "processes": size,
        "results_when_process_0_was_killed": killed,
        "results_when_all_were_stopped_by_sigterm": stopped,
        "equal_to_one_undisturbed_process": True,
        "seconds_undisturbed": round(alone, 1),
        "seconds_of_the_three_runs": round(time.monotonic() - started, 1),
        "cpus": os.cpu_count(),
        "last_run": [json.loads(line) for line in stats],
    }
    print(json.dumps(figures, indent=1))
