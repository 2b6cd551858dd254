"""Prefix attention in float64 NumPy, on prefix and suffix joined: what every implementation is held to."""

from __future__ import annotations

import numpy as np


def plain_attention(inputs: list, index: np.ndarray, prefix_len: np.ndarray, valid: np.ndarray) -> np.ndarray:
    q, k_prefix, v_prefix, k_suffix, v_suffix = inputs
    k, v = (np.concatenate([p[index], s], axis=2) for p, s in ((k_prefix, k_suffix), (v_prefix, v_suffix)))
    repeat = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeat, axis=1), np.repeat(v, repeat, axis=1)
    seen = np.concatenate([np.arange(k_prefix.shape[2]) < prefix_len[index][:, None], valid], axis=1)
    scores = np.where(seen[:, None, None], q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -np.inf)
    with np.errstate(invalid="ignore"):
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = p @ v / p.sum(-1, keepdims=True)
    return np.nan_to_num(out)
