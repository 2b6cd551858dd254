"""The example model as it is trained: its shape, its forward pass for gradients, loss and optimizer."""

from __future__ import annotations

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bicache_jax import example_task as task
from bicache_jax.config import ModelConfig
from bicache_jax.functional import backbone_for

EOS, MASK = task.TOKEN_ID[task.EOS], task.TOKEN_ID[task.MASK]
CONFIG = ModelConfig(
    family="llada",
    vocab_size=len(task.VOCABULARY),
    d_model=128,
    num_layers=8,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    d_mlp=256,
    rope_theta=500000.0,  # most frequencies turn so slowly that content can match across a document
    norm_eps=1e-5,
    max_length=1024,
    mask_id=MASK,
    eos_ids=(EOS,),
)


def with_kept_buffers() -> None:
    """Starts the running script again with an allocator that keeps what it has mapped.

    Fresh temporaries are otherwise mapped and faulted in at every step, which takes longer than the arithmetic.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        settings = {
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": "30000000000",
        }
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def attend(q: Array, k: Array, v: Array, valid: Array) -> Array:
    """Plain attention as batched matrix products; what gradients need."""
    scores = jnp.einsum("bnth,bnsh->bnts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(jnp.where(valid[:, None, None], scores, -1e9), -1), v)


def logits_of(params: dict[str, Any], ids: Array, valid: Array) -> Array:
    """Logits of every position, layers unrolled; embedding and head as matrix products, which scatter nothing."""
    model = backbone_for(CONFIG)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    x = jax.nn.one_hot(ids, CONFIG.vocab_size) @ params["embed"]
    for index in range(CONFIG.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        k, v = model.key_value(layer, x, positions)
        x = model.finish(layer, x, attend(model.query(layer, x, positions), k, v, valid))
    return model.final_norm(params, x) @ params["head"].T


def loss_of(params: dict[str, Any], batch: tuple[Array, ...]) -> Array:
    """Mean cross-entropy over the targets that count."""
    ids, targets, counts, valid = batch
    log_p = jax.nn.log_softmax(logits_of(params, ids, valid))
    picked = jnp.sum(log_p * jax.nn.one_hot(targets, CONFIG.vocab_size), axis=-1)
    return -jnp.sum(picked * counts) / jnp.maximum(jnp.sum(counts), 1)


def make_optimizer(rate: float, total: int) -> optax.GradientTransformation:
    """Adam as the task likes it: warm-up, constant, and a linear end."""
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, 30),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, rate * 0.02, max(1, int(total * 0.3))),
        ],
        [30, int(total * 0.7)],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, 0.9, 0.98))
