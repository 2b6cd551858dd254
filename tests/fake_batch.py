"""`scripts/batch_inference.py` with the stand-in of `fake_run.py` behind it, to be killed; jax is not imported.

Option `worker=I/N` of the stand-in's `--model` is what `jax.distributed` would say.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fake_run import FakeRun

from bicache_jax.cli import backend

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import batch_inference  # noqa: E402


def join(args):
    options = dict(part.partition("=")[::2] for part in args.model.split(","))
    number, _, count = options.get("worker", "0/1").partition("/")
    return int(number), int(count)


if __name__ == "__main__":
    backend.Run = FakeRun  # type: ignore[misc, assignment]
    batch_inference.join = join
    batch_inference.leave = lambda worker, seconds: None
    batch_inference.POLL_SECONDS = 0.05
    os._exit(batch_inference.main())
