"""Training of a small LLaDA: its shape, forward pass for gradients, loss, optimizer, and checkpoint."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from safetensors.numpy import save_file

from bicache_jax.core.config import ModelConfig
from bicache_jax.example import task
from bicache_jax.models import llada
from bicache_jax.wiring import backbone_for

EOS, MASK, PAD = (task.TOKEN_ID[word] for word in (task.EOS, task.MASK, task.PAD))
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
    """Restarts the running script with an allocator that keeps the memory it has mapped.

    Otherwise temporaries are mapped and faulted in at every step, which takes longer than the arithmetic.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        settings = {
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": "30000000000",
        }
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def attend(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Plain attention as batched matrix products, for gradients.

    Args:
        q: [B, N, T, H].
        k: [B, N, T, H].
        v: [B, N, T, H].
        visible: which keys a query sees, [B, T, T]; [B, 1, T] if all queries see the same.

    Returns:
        [B, N, T, H].
    """
    scores = jnp.einsum("bnth,bnsh->bnts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bnsh->bnth", jax.nn.softmax(jnp.where(visible[:, None], scores, -1e9), -1), v)


def logits_of(params: dict[str, Any], ids: Array, visible: Array, config: ModelConfig = CONFIG) -> Array:
    """Logits of every position, with unrolled layers; embedding and head are matrix products, to avoid scatters."""
    model = backbone_for(config)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    x = jax.nn.one_hot(ids, config.vocab_size) @ params["embed"]
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        k, v = model.key_value(layer, x, positions)
        x = model.finish(layer, x, attend(model.query(layer, x, positions), k, v, visible))
    return model.final_norm(params, x) @ params["head"].T


def loss_of(params: dict[str, Any], batch: tuple[Array, ...], config: ModelConfig = CONFIG) -> Array:
    """Mean cross-entropy over the targets that count; a batch is inputs, targets, which targets count, visibility."""
    ids, targets, counts, visible = batch
    log_p = jax.nn.log_softmax(logits_of(params, ids, visible, config))
    picked = jnp.sum(log_p * jax.nn.one_hot(targets, config.vocab_size), axis=-1)
    return -jnp.sum(picked * counts) / jnp.maximum(jnp.sum(counts), 1)


def make_optimizer(rate: float, total: int) -> optax.GradientTransformation:
    """Adam with warm-up, constant rate, and linear decay at the end."""
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, 30),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, rate * 0.02, max(1, int(total * 0.3))),
        ],
        [30, int(total * 0.7)],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, 0.9, 0.98))


def drawn_ahead(
    draw: Callable[[int], tuple[np.ndarray, ...]], first: int
) -> Generator[tuple[np.ndarray, ...], None, None]:
    """Batches of the steps from `first` on; the next batch is drawn in a thread while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(draw, first)
        step = first
        while True:
            batch = pending.result()
            step += 1
            pending = pool.submit(draw, step)
            yield batch


def export(
    params: dict[str, Any],
    folder: Path,
    config: ModelConfig = CONFIG,
    token_id: Mapping[str, int] = task.TOKEN_ID,
    dtype: Any = np.float32,
) -> None:
    """Writes a checkpoint in LLaDA's layout, with its tokenizer."""
    from bicache_jax.example.tokenizer import write_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for path, name in llada.tensor_map(config).names.items():
        leaf: Any = params
        for part in path:
            leaf = leaf[part]
        values = np.asarray(leaf, dtype)
        values = values.swapaxes(-1, -2) if path[-1] == "kernel" else values
        if path[0] == "layers":
            tensors |= {name.format(layer=index): np.ascontiguousarray(part) for index, part in enumerate(values)}
        else:
            tensors[name] = np.ascontiguousarray(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_type": "llama",
        "d_model": config.d_model,
        "embedding_size": config.vocab_size,
        "eos_token_id": EOS,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": MASK,
        "max_sequence_length": config.max_length,
        "mlp_hidden_size": config.d_mlp,
        "mlp_ratio": config.d_mlp // config.d_model,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "pad_token_id": PAD,
        "rms_norm_eps": config.norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": config.rope_theta,
        "scale_logits": False,
        "vocab_size": config.vocab_size,
        "weight_tying": False,
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    write_tokenizer(folder, token_id)
