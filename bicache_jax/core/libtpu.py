"""libtpu on machines without a TPU: it compiles for TPUs that are not here, and complains that there is none."""

from __future__ import annotations

import os
from pathlib import Path

_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def expect_no_tpu() -> None:
    """Tells libtpu, through the environment, not to look for a TPU where the machine has no device file of one.

    It asks the cloud for its machine's name and place otherwise, and complains on standard error when there is no
    answer. Call it before jax starts its backends; what the user has set stays.
    """
    if any(Path("/dev").glob("accel*")) or any(Path("/dev").glob("vfio/[0-9]*")):
        return
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
