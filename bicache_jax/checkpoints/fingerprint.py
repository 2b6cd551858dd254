"""The fingerprint of a checkpoint: what a boundary table, a journal and a cache name the model by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def fingerprint(
    config: Mapping[str, Any],
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    norms: Iterable[tuple[str, np.ndarray]],
) -> str:
    """Names a checkpoint by what tells it from others without reading all of it.

    Args:
        config: fields of `config.json`.
        headers: dtype and shape of every tensor.
        norms: the norm tensors, which no two trained models share.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    header = {name: [dtype, list(shape)] for name, (dtype, shape) in headers.items()}
    digest.update(json.dumps([dict(config), header], sort_keys=True, separators=(",", ":")).encode())
    for name, values in sorted(norms, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:32]
