"""Tokens of the published decoding loops, one by one, in batches with strangers."""

from __future__ import annotations

from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import (
    CacheConfig,
    Engine,
    Model,
    Request,
    denoise,
    encode_prefix,
    forward,
    load_model,
    wiring,
)
from bicache_jax.kernels import PrefixAttention

_SETTINGS = ("boundary", "refresh_interval", "steps", "gen_length", "block_length", "threshold", "alg", "batch")


def _groups() -> list[Any]:
    """Family, block cache and names of cases that can run in one batch: they differ in their prefix only."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for family in golden.FOLDERS:
        for name, case in golden.cases(family).items():
            key = (family, golden.block_cache(name), *(case.get(field) for field in _SETTINGS), "prefix_len" in case)
            groups.setdefault(key, []).append(name)
    # A few of each kind are quick. A prefix block cache compiles one program for each place of its window.
    left = {(family, block_cache): 2 for family in golden.FOLDERS for block_cache in ("off", "dual")}
    params = []
    for (family, block_cache, *_), names in sorted(groups.items(), key=str):
        left[family, block_cache] = left.get((family, block_cache), 0) - 1
        slow = left[family, block_cache] < 0
        marks = [pytest.mark.slow] * slow
        if block_cache == "prefix":
            marks = [pytest.mark.full]
        params.append(pytest.param(family, block_cache, tuple(names), marks=marks))
    return params


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {family: load_model(folder) for family, folder in golden.FOLDERS.items()}


@pytest.mark.parametrize("family", list(golden.FOLDERS))
def test_forward_logits_match_the_published_model(models: dict[str, Model], family: str) -> None:
    model = models[family]
    logits = forward(model.params, model.config, jnp.asarray(golden.expected(family)["forward_ids"], jnp.int32))
    np.testing.assert_allclose(logits, golden.expected(family)["forward_logits"], atol=3e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "block_cache", "names"), _groups(), ids=lambda value: value[0] if isinstance(value, tuple) else value
)
def test_tokens_match_the_published_loop(
    models: dict[str, Model], family: str, block_cache: str, names: tuple[str, ...]
) -> None:
    cases = [golden.cases(family)[name] for name in names]
    sampling = golden.sampling(cases[0])
    cached = "prefix_len" in cases[0]
    rng = np.random.default_rng(len(names))
    requests, wanted = [], {}
    for name, case in zip(names, cases, strict=True):
        prompts = golden.expected(family)["prompt_batch3" if "batch" in case else "prompt"]
        for row, prompt in enumerate(prompts):
            request = Request(f"{name}/{row}", tuple(map(int, prompt)), case.get("prefix_len"), sampling)
            requests.append(request)
            wanted[request.id] = tuple(map(int, golden.expected(family)[name][row, len(prompt) :]))
    for stranger in range(2):
        prompt = tuple(map(int, rng.integers(2, 290, 25 + 9 * stranger)))
        requests.insert(stranger, Request(f"stranger{stranger}", prompt, 20 if cached else None, sampling))
    settings: dict[str, Any] = {"policy": "none"}
    if cached:
        settings = {"boundary": cases[0]["boundary"], "refresh_interval": cases[0]["refresh_interval"]}
    engine = Engine(models[family], cache=CacheConfig(block_cache=block_cache, **settings))  # type: ignore[arg-type]
    results = {result.id: result for result in engine.generate(requests)}
    for identifier, tokens in wanted.items():
        assert results[identifier].token_ids == tokens, identifier
        assert results[identifier].forward_passes <= golden.cases(family)[identifier.split("/")[0]]["nfe"]


_encode = jax.jit(encode_prefix, static_argnames=("config", "boundaries"))
_denoise = jax.jit(denoise, static_argnames=("config", "sampling", "block_cache", "attention"))


def _run(model: Model, case: dict[str, Any], prompt: np.ndarray, **changes: Any) -> Any:
    case = case | changes
    prefix_len = case.get("prefix_len", 0)
    response = np.zeros((prompt.shape[0], case["gen_length"]), np.int32)
    return _denoise(
        model.params,
        model.config,
        _encode(model.params, model.config, jnp.asarray(prompt[0, :prefix_len], jnp.int32)),
        jnp.asarray(np.concatenate([prompt[:, prefix_len:], response], axis=1), jnp.int32),
        case["boundary"],
        golden.sampling(case),
        jax.random.key(0),
        refresh_interval=case["refresh_interval"],
        block_cache=case.get("block_cache", "off"),
        attention=case.get("attention", "auto"),
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llada", "bicache_P16_b3_N4"),
        pytest.param("llada", "bicache_semi_P30_b3_N7", marks=pytest.mark.slow),
        pytest.param("llada", "bicache_dual_P16_b3_N4", marks=pytest.mark.slow),
        ("dream", "dream_bicache_entropy_P16_b3_N4"),
    ],
)
def test_the_functional_layer_gives_them_too(models: dict[str, Model], family: str, name: str) -> None:
    case, prompt = golden.cases(family)[name], golden.expected(family)["prompt"]
    out = _run(models[family], case, prompt, block_cache=golden.block_cache(name))
    np.testing.assert_array_equal(out.tokens, golden.expected(family)[name][:, prompt.shape[1] :])
    assert int(out.forward_passes[0]) == case["nfe"]


@pytest.mark.parametrize(
    ("implementation", "family", "name"),
    [
        ("pallas_tpu", "dream", "dream_bicache_entropy_P16_b3_N4"),
        pytest.param("pallas_gpu", "llada", "bicache_P16_b3_N4", marks=pytest.mark.slow),
        pytest.param("pallas_tpu", "llada", "bicache_P16_b3_N4", marks=(pytest.mark.slow, pytest.mark.full)),
        pytest.param("pallas_gpu", "llada", "bicache_dual_P16_b3_N4", marks=(pytest.mark.slow, pytest.mark.full)),
    ],
)
def test_the_kernels_give_them_too(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, implementation: str, family: str, name: str
) -> None:
    """In Pallas's interpreter."""
    monkeypatch.setattr(wiring, "PrefixAttention", lambda name: PrefixAttention(name, interpret=True))
    prompt = golden.expected(family)["prompt"]
    changes = {"block_cache": golden.block_cache(name), "attention": implementation}
    out = _run(models[family], golden.cases(family)[name], prompt, **changes)
    np.testing.assert_array_equal(out.tokens, golden.expected(family)[name][:, prompt.shape[1] :])


def test_last_layer_boundary_equals_the_naive_cache_and_zero_refreshed_always_equals_none(
    models: dict[str, Model],
) -> None:
    model, case = models["llada"], golden.cases("llada")["bicache_P16_b3_N4"]
    prompt, num_layers = golden.expected("llada")["prompt"], models["llada"].config.num_layers
    last, naive = (_run(model, case, prompt, boundary=boundary).tokens for boundary in (num_layers - 1, num_layers))
    np.testing.assert_array_equal(last, naive)
    fresh = _run(model, case, prompt, boundary=0, refresh_interval=1).tokens
    np.testing.assert_array_equal(fresh, _run(model, case, prompt, prefix_len=0).tokens)
