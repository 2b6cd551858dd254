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

from bicache_jax.bulk.storage import path_of, write_whole
from bicache_jax.core.types import BicacheError

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
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
        module, name = {"s3": ("s3fs", "S3FileSystem"), "gs": ("gcsfs", "GCSFileSystem")}[request.param]
        kind = getattr(importlib.import_module(module), name)
        kind.clear_instance_cache()  # they know the server of the last test
        files = kind()
        if request.param == "s3":
            files.mkdir("bucket")
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
    for journals in (1, 3, None):
        workers = [
            start(f"{scheme}://bucket/out", [f"{scheme}://bucket/in/a.jsonl"], "--resume", worker=f"{i}/2", wait=0.2)
            for i in range(2)
        ]
        for _ in range(1200):
            files.invalidate_cache()
            found = [name for name in files.find("bucket/out") if name.endswith(".journal")]
            if journals is None or len(found) >= journals:
                break
            time.sleep(0.1)
        if journals is not None:
            for worker in chance.sample(workers, 2):
                worker.kill()
        ends = [finish(worker) for worker in workers]
        assert [status for status, _ in ends] == [0 if journals is None else -signal.SIGKILL] * 2, ends
    files.invalidate_cache()
    assert files.cat("bucket/out/a.jsonl") == (tmp_path / "whole" / "a.jsonl").read_bytes()
    assert not [name for name in files.find("bucket/out") if "_state" in name]


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp to gcsfs
def test_an_upload_of_which_a_part_fails_replaces_nothing(storage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, files = storage
    path = path_of(f"{scheme}://bucket/out/a.jsonl")
    write_whole(path, [b"first\n"])
    lines = [bytes(2**20)] * 120
    parts = 0

    def second_part_fails(original: Any, is_part: Any) -> Any:
        async def call(*args: Any, **more: Any) -> Any:
            nonlocal parts
            parts += bool(is_part(args))
            if is_part(args) and parts == 2:
                raise OSError("the connection is gone")
            return await original(*args, **more)

        return call

    with monkeypatch.context() as patch:
        if scheme == "s3":
            kind = importlib.import_module("s3fs").S3FileSystem
            patch.setattr(kind, "_call_s3", second_part_fails(kind._call_s3, lambda args: args[1] == "upload_part"))
        else:
            module = importlib.import_module("gcsfs.core")
            patch.setattr(module, "upload_chunk", second_part_fails(module.upload_chunk, lambda args: True))
        with pytest.raises(BicacheError, match=f"cannot write {path}: "):
            write_whole(path, lines)
    assert parts >= 2 and path.read_bytes() == b"first\n"
    write_whole(path, lines)
    assert path.stat().length == len(lines) * 2**20
