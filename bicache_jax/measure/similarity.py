"""Similarity of a prefix's KV computed alone and in the full sequence, by layer.

Source: BiCache, arXiv 2606.07571, section 3 (the observation) and 4.2 (the boundary table made from it).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.decoding.encode import encode


def _cosine(a: Float[Array, "L G K P H"], b: Float[Array, "L G K P H"]) -> Float[Array, "L G P"]:
    """Cosine similarity per token over flattened heads, in float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dot, norm_a, norm_b = (jnp.sum(x * y, axis=(2, 4)) for x, y in ((a, b), (a, a), (b, b)))
    return dot / jnp.maximum(jnp.sqrt(norm_a * norm_b), 1e-30)


@functools.partial(jax.jit, static_argnames=("backbone", "prefix_bucket"))
def layer_similarity(
    backbone: Backbone,
    params: Params,
    ids: Int[Array, "G S"],
    length: Int[Array, " G"],
    prefix_len: Int[Array, " G"],
    *,
    prefix_bucket: int,
) -> Float[Array, "G L"]:
    """Mean cosine similarity of prefix-only and full-sequence prefix KV in each layer.

    Args:
        backbone: the model (static).
        params: its parameters.
        ids: full sequences, padded to S.
        length: tokens in each sequence.
        prefix_len: tokens in each sequence's prefix, at least 1.
        prefix_bucket: P, at least every prefix_len and at most S (static).

    Returns:
        For each sequence and layer, the mean over prefix tokens and over K and V.
    """
    num_layers = backbone.config.num_layers
    everything = jnp.asarray([num_layers - 1], jnp.int32)
    run = functools.partial(encode, backbone, params, boundaries=everything, num_layers=num_layers)
    alone = run(prefix_ids=ids[:, :prefix_bucket], prefix_len=prefix_len)
    full = run(prefix_ids=ids, prefix_len=length)
    counted = jnp.arange(prefix_bucket) < prefix_len[:, None]
    per_token = sum(
        _cosine(a, b[..., :prefix_bucket, :]) for a, b in ((alone.k, full.k), (alone.v, full.v))
    ) / jnp.float32(2)
    mean = jnp.sum(jnp.where(counted, per_token, 0), axis=-1) / jnp.sum(counted, axis=-1)
    return mean.T
