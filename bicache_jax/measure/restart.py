"""How long a fresh process takes to its first token, with and without compiled programs kept from an earlier one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bicache_jax.core.config import CacheConfig, ModelConfig
from bicache_jax.core.types import BicacheError
from bicache_jax.measure.benchmark import Case, synthetic_requests
from bicache_jax.measure.policies import parse_policy


def measure_restart(config: ModelConfig, case: Case, model: Sequence[str]) -> dict[str, float]:
    """Times `bicache generate --stream` from process start to the first line that it prints.

    Frames come every step there, so that the first line is of the first denoising step; the programs are the case's.

    Args:
        config: the architecture.
        case: what is asked.
        model: flags of `generate` that name the model.

    Returns:
        Seconds: `cold_start_s` with an empty compilation cache, `warm_start_s` in the next process.

    Raises:
        BicacheError: the child process failed.
    """
    cache, sampling = parse_policy(case.policy, CacheConfig()), case.sampling
    command = [sys.executable, "-m", "bicache_jax", "generate", *model, "--output", "-"]
    command += ["--stream", "--stream-every", "1", "--policy", cache.policy, "--block-cache", cache.block_cache]
    command += ["--cache-dtype", cache.cache_dtype]
    command += ["--refresh-interval", f"{case.refresh_interval}"]
    command += ["--gen-length", f"{sampling.gen_length}", "--steps", f"{sampling.num_steps}"]
    command += ["--block-length", f"{sampling.block_size}", "--batch-size", f"{case.rows}"]
    if case.boundary != "auto":
        command += ["--boundary", f"{case.boundary}"]
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "requests.jsonl"
        requests.write_text(
            "".join(
                json.dumps({"prompt_ids": list(request.prompt_ids), "prefix_len": request.prefix_len}) + "\n"
                for request in synthetic_requests(config, case)
            )
        )
        command += ["--input", str(requests), "--compilation-cache", str(Path(folder) / "xla")]
        return {"cold_start_s": _first_line(command), "warm_start_s": _first_line(command)}


def _first_line(command: list[str]) -> float:
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as child,
    ):
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = time.perf_counter() - started
        child.stdout.read()
        child.wait()
        complaints.seek(0)
        complaint = complaints.read().strip().splitlines()
    if not line or child.returncode:
        raise BicacheError(f"--restart: the child process failed: {complaint[-1] if complaint else 'no message'}")
    return round(seconds, 3)
