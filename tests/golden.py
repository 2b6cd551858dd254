"""The golden checkpoints: tiny random models with outputs of the published decoding loops."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bicache_jax.checkpoints.fields import read_json
from bicache_jax.checkpoints.safetensors_folder import SafetensorsFolder, load_params
from bicache_jax.checkpoints.targets import targets
from bicache_jax.core.config import ModelConfig, SamplingConfig
from bicache_jax.loading import tensor_map
from bicache_jax.models import abstract, registered

DATA = Path(__file__).parent / "data"
FOLDERS = {"llada": DATA / "llada-mha", "dream": DATA / "dream-gqa"}


@functools.cache
def model(family: str) -> tuple[ModelConfig, Any]:
    """Config and float32 parameters of a golden checkpoint."""
    folder = FOLDERS[family]
    with SafetensorsFolder(folder) as tensors:
        config = registered()[family].config_from_hf(read_json(folder / "config.json"), tensors.names, "config.json")
        return config, load_params(tensors, tensor_map(config), targets(abstract(config, jnp.float32)))


@functools.cache
def expected(family: str) -> dict[str, np.ndarray]:
    """Recorded arrays by name."""
    with np.load(FOLDERS[family] / "expected.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@functools.cache
def cases(family: str) -> dict[str, dict[str, Any]]:
    """Settings of every case by name."""
    return json.loads((FOLDERS[family] / "cases.json").read_text())["cases"]


def block_cache(name: str) -> str:
    """Block cache of a case."""
    return next((kind for kind in ("dual", "prefix") if f"_{kind}_" in name), "off")


def sampling(case: dict[str, Any]) -> SamplingConfig:
    """Decoding settings of a case."""
    rule = case.get("alg", "low_confidence")
    return SamplingConfig(
        case["gen_length"],
        case["steps"],
        case.get("block_length"),
        remasking="low_confidence" if rule == "confidence_threshold" else rule,
        threshold=case.get("threshold"),
    )
