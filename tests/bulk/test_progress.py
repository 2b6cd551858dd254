"""The time left: never told from a burst's beginning, nor from compilation."""

from __future__ import annotations

import json
import types
from pathlib import Path

from bicache_jax.bulk.progress import Progress


def test_the_time_left_is_that_of_whole_batches(tmp_path: Path) -> None:
    """Ten batches of 50 results, 20 s each, the first after 60 s of compilation; a report every 5 s."""
    now, counts = 0.0, types.SimpleNamespace(compile_seconds=0.0, tokens=0)
    path = tmp_path / "stats.jsonl"
    progress = Progress(path, "0", 500, every=5, say=False, stats=lambda: counts, clock=lambda: now)
    truth = []
    for batch in range(10):
        now += 20 + 60 * (batch == 0)
        counts.compile_seconds = 60.0
        for _ in range(50):
            before = path.read_text().count("\n") if path.exists() else 0
            now += 0.001
            progress.advance(1)
            if path.exists() and path.read_text().count("\n") > before:
                truth.append(20.0 * (9 - batch))
    left = [json.loads(line)["eta_seconds"] for line in path.read_text().splitlines()]
    assert len(left) == len(truth) == 10 and left[0] is None
    for told, true in zip(left[1:], truth[1:], strict=True):
        assert true <= told <= true + 21  # the batch whose results are just coming counts as left
