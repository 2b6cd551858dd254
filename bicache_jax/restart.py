"""How long a fresh process takes to its first token, with and without compiled programs kept from an earlier one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bicache_jax.types import BicacheError

_REQUEST = {"id": "first", "prompt_ids": list(range(5, 55)), "prefix_len": 40, "gen_length": 16}


def measure_restart(model: str, dtype: str) -> dict[str, float]:
    """Times `bicache generate --stream` from process start to the first line that it prints.

    Args:
        model: as `--model` takes it.
        dtype: as `--dtype` takes it.

    Returns:
        Seconds: `cold_s` with an empty compilation cache, `warm_s` in the next process.

    Raises:
        BicacheError: the child process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.jsonl"
        requests.write_text(json.dumps(_REQUEST) + "\n")
        command = [sys.executable, "-m", "bicache_jax", "generate", "--model", model, "--dtype", dtype, "--stream"]
        command += ["--input", str(requests), "--output", "-", "--compilation-cache", str(Path(folder) / "xla")]
        return {"cold_s": _first_line(command), "warm_s": _first_line(command)}


def _first_line(command: list[str]) -> float:
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - started
        child.stdout.read()
        complaint = child.stderr.read().strip()
    if not line:
        raise BicacheError(f"--restart: the child process printed no token: {complaint.splitlines()[-1:] or ''}")
    return round(seconds, 3)
