"""Argument checks of prefix attention, and the calls that each kernel does not support."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax.core.device import LEAST_CAPABILITY, compute_capability
from bicache_jax.core.kv import Quantized

PLATFORM = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
_DTYPES = {"pallas_tpu": ("float32", "bfloat16"), "pallas_gpu": ("float32", "bfloat16", "float16")}
_WIDEST = 256  # lanes of two registers; wider heads have not been compiled


def check(
    q: Any,
    k_prefix: Any,
    v_prefix: Any,
    k_suffix: Any,
    v_suffix: Any,
    *,
    prefix_index: Any,
    prefix_len: Any,
    suffix_valid: Any,
    layer: Any,
    block_ids: Any = None,
) -> None:
    """Checks that shapes match.

    Raises:
        ValueError: a shape is wrong; the message names the argument.
    """
    stacked = layer is not None
    rank = 5 if stacked else 4
    if q.ndim != 4 or k_suffix.ndim != 4:
        raise ValueError(f"q must be [B, N, T, H] and k_suffix [B, K, S, H], got {q.shape} and {k_suffix.shape}")
    if k_prefix.ndim != rank:
        wanted = "[L, G, K, P, H] with a layer" if stacked else "[G, K, P, H] without a layer"
        raise ValueError(f"k_prefix must be {wanted}, got {k_prefix.shape}")
    if isinstance(k_prefix, Quantized) != isinstance(v_prefix, Quantized):
        raise ValueError("k_prefix and v_prefix must both be in 8 bits or neither")
    if v_prefix.shape != k_prefix.shape:
        raise ValueError(f"v_prefix must have k_prefix's shape {k_prefix.shape}, got {v_prefix.shape}")
    if v_suffix.shape != k_suffix.shape:
        raise ValueError(f"v_suffix must have k_suffix's shape {k_suffix.shape}, got {v_suffix.shape}")
    rows, heads, _, head_dim = q.shape
    prefixes, kv_heads = k_prefix.shape[-4:-2]
    if (k_suffix.shape[0], k_suffix.shape[3]) != (rows, head_dim):
        raise ValueError(f"k_suffix must have q's rows and head size, got {k_suffix.shape} for q {q.shape}")
    if (k_suffix.shape[1], k_prefix.shape[-1]) != (kv_heads, head_dim):
        raise ValueError(f"k_prefix and k_suffix must agree in K and H, got {k_prefix.shape} and {k_suffix.shape}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"KV heads must divide query heads, got K={kv_heads} and N={heads}")
    if prefix_index is None and prefixes != rows:
        raise ValueError(f"prefix_index is needed for {rows} rows over {prefixes} prefixes")
    if prefix_index is not None and prefix_index.shape != (rows,):
        raise ValueError(f"prefix_index must be [B] = ({rows},), got {prefix_index.shape}")
    if prefix_len.shape != (prefixes,):
        raise ValueError(f"prefix_len must be [G] = ({prefixes},), got {prefix_len.shape}")
    if suffix_valid.shape != (rows, k_suffix.shape[2]):
        raise ValueError(f"suffix_valid must be [B, S] = {(rows, k_suffix.shape[2])}, got {suffix_valid.shape}")
    if block_ids is not None:
        wanted_shapes, found = ((rows, q.shape[2]), suffix_valid.shape), tuple(part.shape for part in block_ids)
        if found != wanted_shapes:
            raise ValueError(f"block_ids must be [B, T] and [B, S] = {wanted_shapes}, got {found}")


def refusal(implementation: str, q: Any, *keys_and_values: Any) -> str | None:
    """Why a kernel does not support a call, on any platform or on the devices that are here; None if it does.

    Args:
        implementation: `pallas_tpu` or `pallas_gpu`.
        q: queries.
        *keys_and_values: prefix and suffix keys and values; a prefix in 8 bits is served in every dtype.
    """
    floats = [array for array in (q, *keys_and_values) if not isinstance(array, Quantized)]
    names = sorted({jnp.dtype(array.dtype).name for array in floats})
    if len(names) > 1:
        return f"{implementation} takes arrays of one dtype, got {', '.join(names)}"
    if names[0] not in _DTYPES[implementation]:
        return f"{implementation} computes in {', '.join(_DTYPES[implementation])}, got {names[0]}"
    if implementation == "pallas_gpu" and jax.default_backend() == "gpu":
        capability = compute_capability(jax.devices()[0])
        if capability is not None and capability < LEAST_CAPABILITY:
            return f"{implementation} needs compute capability {LEAST_CAPABILITY}, this device has {capability}"
    if implementation == "pallas_tpu" and q.shape[-1] > _WIDEST:
        return f"{implementation} takes head sizes up to {_WIDEST}, got {q.shape[-1]}"
    return None


def elsewhere(implementation: str, platform: str) -> str | None:
    """Why a kernel does not run on a platform; None if it does, or if `implementation` is not a kernel.

    Args:
        implementation: as `prefix_attention` takes it.
        platform: platform of the computation, as JAX names backends or lowering platforms.
    """
    wanted = PLATFORM.get(implementation)
    if wanted is None or platform == wanted or (platform, wanted) == ("gpu", "cuda"):
        return None
    return f"{implementation} runs on {wanted}, and this is for {platform}; use 'auto' or 'xla'"
