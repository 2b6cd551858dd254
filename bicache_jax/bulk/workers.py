"""Workers of a bulk job meet, wait for each other, and leave together."""

from __future__ import annotations

import itertools
import threading
from contextlib import suppress

from bicache_jax.bulk.job import Job, Stopped
from bicache_jax.bulk.state import State, Worker
from bicache_jax.bulk.storage import AnyPath
from bicache_jax.core.types import BicacheError

POLL_SECONDS = 1.0  # between looks at whether the outputs are complete
POLLS = 600  # until worker 0 looks whether it could complete them, and until failing looks end a worker
TRIES = 3  # of worker 0 to complete them


def join(
    *, distributed: bool, coordinator: str | None, processes: int | None, process: int | None, heartbeat_seconds: int
) -> tuple[int, int]:
    """Meets the other processes; returns which one this is, and how many there are.

    Args:
        distributed: let jax find the others.
        coordinator: host and port of process 0.
        processes: how many there are.
        process: which one this is.
        heartbeat_seconds: after this long without a sign of one process, jax ends the others.

    Raises:
        BicacheError: they cannot be found.
    """
    if not (distributed or coordinator):
        return 0, 1
    import jax

    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=heartbeat_seconds)
    except (RuntimeError, ValueError) as error:
        raise BicacheError(f"cannot join the other processes: {str(error).splitlines()[0]}") from None
    return jax.process_index(), jax.process_count()


def wait_for_others(job: Job, state: State, worker: Worker) -> list[AnyPath]:
    """Waits until the outputs are complete; returns them if this worker had to complete them.

    Process 0 must outlive the others, and a worker that finishes first must not look dead.

    Raises:
        Stopped: by SIGTERM.
        BicacheError: looks at the outputs fail for long.
    """
    failed = tried = 0
    for poll in itertools.count(1):
        try:
            if state.is_settled():
                break
            failed = 0
        except BicacheError:  # a bucket that is busy for a moment must not end a worker that has done its part
            failed += 1
            if failed >= POLLS:
                raise
        if job.stop.wait(POLL_SECONDS):
            job.remains = "nothing of this worker's part remains, and something of others' does"
            raise Stopped
        # A network file system may have shown to none of them, when it was done, that all others were.
        if worker.number == 0 and poll % POLLS == 0:
            try:
                if written := job.finish():
                    return written
            except BicacheError:
                tried += 1
                if tried >= TRIES:
                    raise
    return []


def leave(worker: Worker, seconds: float) -> None:
    """Leaves together with the other processes; alone, if they have not left after some seconds."""
    if worker.count == 1:
        return
    import jax

    def shutdown() -> None:
        with suppress(Exception):  # the others may be gone
            jax.distributed.shutdown()

    thread = threading.Thread(target=shutdown, daemon=True)
    thread.start()
    thread.join(seconds)
