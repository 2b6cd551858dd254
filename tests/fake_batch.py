"""`bicache batch` with the stand-in of `fake_run.py` behind it, to be killed; jax is not imported.

Option `worker=I/N` of the stand-in's `--model` is what `jax.distributed` would say.
"""

from __future__ import annotations

import os
import sys

from fake_run import FakeSession

from bicache_jax.bulk import workers
from bicache_jax.cli import backend, main


def worker() -> tuple[int, int]:
    model = sys.argv[sys.argv.index("--model") + 1]
    options = dict(part.partition("=")[::2] for part in model.split(","))
    number, _, count = options.get("worker", "0/1").partition("/")
    return int(number), int(count)


if __name__ == "__main__":
    backend.open_session = FakeSession  # type: ignore[assignment]
    workers.join = lambda **flags: worker()
    workers.leave = lambda worker, seconds: None
    workers.POLL_SECONDS = 0.05
    os._exit(main(["batch", *sys.argv[1:]]))
