"""The fingerprint of a checkpoint, by which boundary tables, journals and caches identify the model."""

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
    """Identifies a checkpoint without reading all of it.

    Args:
        config: fields of `config.json`.
        headers: dtype and shape of every tensor.
        norms: the norm tensors, which differ between trained models.

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
