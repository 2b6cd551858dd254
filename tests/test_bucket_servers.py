"""Batch inference against S3 and Google Cloud Storage as they are spoken over HTTP, by servers on this machine.

Needs `pip install -e '.[buckets]' 'moto[server]' gcp-storage-emulator`.
"""

from __future__ import annotations

import importlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_run import write_requests
from test_batch_inference import finish, start

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "scripts" / "batch_inference.py")
REQUESTS = ROOT / "examples" / "requests.jsonl"


@pytest.fixture(params=["s3", "gs"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """The scheme, and the file system of a server that holds an empty bucket named `bucket`."""
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[request.param])
    pytest.importorskip({"s3": "moto.server", "gs": "gcp_storage_emulator"}[request.param])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    tools = Path(sys.executable).parent
    if request.param == "s3":
        command = [str(tools / "moto_server"), "-p", port]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    else:
        command = [str(tools / "gcp-storage-emulator"), "start", "--host=127.0.0.1", f"--port={port}"]
        command += ["--in-memory", "--default-bucket=bucket"]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.1)
        if request.param == "s3":
            files = importlib.import_module("s3fs").S3FileSystem(endpoint_url=address)
            files.mkdir("bucket")
        else:
            files = importlib.import_module("gcsfs").GCSFileSystem()
        yield request.param, files
    finally:
        server.kill()
        server.wait()


def test_a_killed_run_goes_on_and_ends_in_the_bytes_of_one_on_disk(storage: Any, tmp_path: Path) -> None:
    scheme, files = storage
    files.put(str(REQUESTS), "bucket/in/requests.jsonl")
    base = [sys.executable, SCRIPT, "--model", "example", "--window", "20", "--batch-size", "4", "--resume"]
    command = [*base, "--input", f"{scheme}://bucket/in/*.jsonl", "--output", f"{scheme}://bucket/out"]

    def journals() -> int:
        files.invalidate_cache()
        return sum(name.endswith(".journal") for name in files.find("bucket/out"))

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(1200):
        if journals() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    assert process.wait() != 0 and journals()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    local = subprocess.run(
        [*base, "--input", str(REQUESTS), "--output", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert local.returncode == 0, local.stderr
    assert not journals()  # and what was listed before is forgotten
    assert files.cat("bucket/out/requests.jsonl") == (tmp_path / "out" / "requests.jsonl").read_bytes()


def test_workers_that_are_killed_end_in_the_bytes_of_one_on_disk(storage: Any, tmp_path: Path) -> None:
    """Many small windows, in some of which a worker has nothing, and journals that come while others list them."""
    scheme, files = storage
    source = write_requests(tmp_path / "a.jsonl", 40, n=2)
    assert finish(start(tmp_path / "whole", [source]))[0] == 0
    files.put(str(source), "bucket/in/a.jsonl")
    chance = random.Random(0)
    for wait in (0.5, 2.0, 4.0, None):
        workers = [
            start(f"{scheme}://bucket/out", [f"{scheme}://bucket/in/a.jsonl"], "--resume", worker=f"{i}/2", wait=0.03)
            for i in range(2)
        ]
        if wait is not None:
            time.sleep(wait)
            for worker in chance.sample(workers, 2):
                worker.kill()
        ends = [finish(worker) for worker in workers]
        assert all(status in (0, -signal.SIGKILL) for status, _ in ends), ends
    assert [status for status, _ in ends] == [0, 0]
    files.invalidate_cache()
    assert files.cat("bucket/out/a.jsonl") == (tmp_path / "whole" / "a.jsonl").read_bytes()
    assert not [name for name in files.find("bucket/out") if "_state" in name]
