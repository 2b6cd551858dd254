"""Numbers that are data: model shapes, published boundary tables, and decoding presets (`bicache_jax.cli.presets`)."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

from bicache_jax.boundary import BoundaryTable, table_from_json
from bicache_jax.config import ModelConfig


def _read(folder: str, name: str) -> Any:
    return json.loads((importlib.resources.files(__name__) / folder / f"{name}.json").read_bytes())


def names(folder: str) -> list[str]:
    """Names of the files in a folder (`models`, `boundary`)."""
    entries = (importlib.resources.files(__name__) / folder).iterdir()
    return sorted(entry.name.removesuffix(".json") for entry in entries if entry.name.endswith(".json"))


def model_shape(name: str) -> ModelConfig:
    """A published architecture (`llada_8b`, `dream_7b`), or `small`, one for CPUs."""
    fields = _read("models", name)
    return ModelConfig(**fields | {"eos_ids": tuple(fields["eos_ids"])})


def published_table(config: ModelConfig) -> BoundaryTable | None:
    """The published boundary table for a checkpoint of LLaDA-8B's or Dream-7B's architecture; None for others."""
    shape = ("family", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_mlp")
    for name in names("boundary"):
        published = model_shape(name)
        if all(getattr(config, field) == getattr(published, field) for field in shape):
            return table_from_json(_read("boundary", name), f"configs/boundary/{name}.json")
    return None
