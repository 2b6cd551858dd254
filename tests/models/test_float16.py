"""float16, for devices without bfloat16: as near as it should be, beyond 65,504 in the residual stream, or refused."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import families
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bicache_jax import BicacheError, CacheConfig, Engine, Model, SamplingConfig, forward, load_model
from bicache_jax.convert import convert
from bicache_jax.kernels import support
from bicache_jax.loading import resolve_dtype
from bicache_jax.models import linear, transformer

FOLDERS = {**golden.FOLDERS, **families.FOLDERS}


def loaded(name: str, dtype: str, **settings: Any) -> Model:
    mask = families.recorded(name)["mask_token_id"] if name in families.FOLDERS else None
    return load_model(FOLDERS[name], dtype=dtype, mask_id=mask, **settings)


def logits(model: Model, ids: Any, name: str = "") -> np.ndarray:
    block = 4 if name == "llada2" else None
    return np.asarray(forward(model.params, model.config, jnp.asarray(ids), block_length=block))


def recorded(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the logits that the published code gives them in float32."""
    with np.load(FOLDERS[name] / "expected.npz") as arrays:
        return arrays["forward_ids"], arrays["forward_logits_b4" if "forward_logits_b4" in arrays else "forward_logits"]


@pytest.mark.parametrize(
    ("name", "bound"),
    [("llada", 0.01), *(pytest.param(*case, marks=pytest.mark.full) for case in (("llada2", 0.02), ("dream", 0.01)))],
)
def test_logits_are_nearer_than_those_of_bfloat16(name: str, bound: float) -> None:
    """Measured, root mean square over the recorded spread: 0.005 (bfloat16 0.037 to 0.048), of experts 0.010."""
    ids, wanted = recorded(name)
    error = logits(loaded(name, "float16"), ids, name) - wanted
    assert np.sqrt(np.mean(error**2)) < bound * wanted.std()


def grown(model: Model, factor: float) -> Model:
    """The model with an MLP in its second layer whose output is so many times as large."""
    layers = dict(model.params["layers"])
    kernel = layers["down"]["kernel"]
    times = jnp.where(jnp.arange(len(kernel)) == 1, jnp.asarray(factor**0.5, kernel.dtype), 1)[:, None, None]
    layers["down"] = {**layers["down"], "kernel": kernel * times.astype(kernel.dtype)}
    layers["up"] = {**layers["up"], "kernel": layers["up"]["kernel"] * times.astype(kernel.dtype)}
    return dataclasses.replace(model, params={**model.params, "layers": layers})


def test_the_residual_stream_may_grow_beyond_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here to 1.3 million, measured in float32."""
    exact, half = (grown(loaded("llada", dtype), 1e5) for dtype in ("float32", "float16"))
    ids, _ = recorded("llada")
    wanted, found = logits(exact, ids), logits(half, ids)
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.02 * wanted.std()
    jax.clear_caches()
    for module in (linear, transformer):  # with the same unit as everything else it would not hold them
        monkeypatch.setattr(module, "residual_unit", lambda dtype: 1.0)
    transformer._graphs.cache_clear()
    assert not np.isfinite(logits(half, ids)).any()
    transformer._graphs.cache_clear()
    jax.clear_caches()


def test_what_is_too_large_ends_its_request_with_an_error() -> None:
    model = grown(loaded("llada", "float16"), 1e9)
    engine = Engine(model, cache=CacheConfig(boundary=2), sampling=SamplingConfig(8))
    (result,) = engine.generate([{"prompt_ids": list(range(10, 40))}])
    assert result.finish_reason == "error" and "not finite" in str(result.error)


def test_weights_beyond_its_range_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    convert(FOLDERS["llada"], folder, to="safetensors", dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    name = "model.transformer.blocks.1.q_proj.weight"
    tensors[name][3, 5] = 7e4
    save_file(tensors, folder / "model.safetensors")
    assert load_model(folder, dtype="bfloat16").dtype == jnp.bfloat16
    with pytest.raises(BicacheError, match=f"beyond 65504, where float16 ends, or not finite: {name}; load it in"):
        load_model(folder, dtype="float16")
    convert(folder, tmp_path / "orbax", dtype="float32")
    with pytest.raises(BicacheError, match=f"beyond 65504.*{name}"):
        load_model(tmp_path / "orbax", dtype="float16")


def device(kind: str, platform: str = "gpu", capability: str | None = None) -> Any:
    found = types.SimpleNamespace(device_kind=kind, platform=platform)
    if capability is not None:
        found.compute_capability = capability
    return found


@pytest.mark.parametrize(
    ("there", "dtype"),
    [
        (device("cpu", "cpu"), "float32"),
        (device("Tesla T4", capability="7.5"), "float16"),
        (device("Tesla V100-SXM2-16GB", capability="7.0"), "float16"),
        (device("NVIDIA A10G", capability="8.6"), "bfloat16"),
        (device("NVIDIA H200", capability="9.0"), "bfloat16"),
        (device("TPU v5 lite", "tpu"), "bfloat16"),
        (device("TPU v99", "tpu"), "bfloat16"),
    ],
)
def test_auto_is_what_the_device_multiplies(monkeypatch: pytest.MonkeyPatch, there: Any, dtype: str) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [there])
    assert resolve_dtype("auto") == jnp.dtype(dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: there.platform)
    x = np.zeros((1, 2, 4, 64), np.float16)
    why = support.refusal("pallas_gpu", x, x, x, x, x)
    assert (why is not None) == (dtype == "float16")  # no Triton before compute capability 8


def test_other_types_are_refused() -> None:
    with pytest.raises(BicacheError, match="dtype must be one of auto, float32, bfloat16, float16, got 'float64'"):
        resolve_dtype("float64")
