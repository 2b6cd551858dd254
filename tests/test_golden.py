"""Tokens of the published decoding loops, one by one."""

from __future__ import annotations

from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax.config import SamplingConfig
from bicache_jax.functional import denoise, encode_prefix, forward

_encode = jax.jit(encode_prefix, static_argnames=("config", "boundaries"))
_denoise = jax.jit(denoise, static_argnames=("config", "sampling", "block_cache"))


def _block_cache(name: str) -> str:
    return next((kind for kind in ("dual", "prefix") if f"_{kind}_" in name), "off")


def _run(
    family: str, case: dict[str, Any], prompt: np.ndarray, boundary: int | None = None, block_cache: str = "off"
) -> Any:
    config, params = golden.model(family)
    prefix_len = case.get("prefix_len", 0)
    rule = case.get("alg", "low_confidence")
    sampling = SamplingConfig(
        case["gen_length"],
        case["steps"],
        case.get("block_length"),
        remasking="low_confidence" if rule == "confidence_threshold" else rule,
        threshold=case.get("threshold"),
    )
    response = np.zeros((prompt.shape[0], case["gen_length"]), np.int32)
    return _denoise(
        params,
        config,
        _encode(params, config, prompt[0, :prefix_len]),
        jnp.asarray(np.concatenate([prompt[:, prefix_len:], response], axis=1), jnp.int32),
        case.get("boundary", 0) if boundary is None else boundary,
        sampling,
        jax.random.key(0),
        refresh_interval=case.get("refresh_interval", 1),
        block_cache=block_cache,
    )


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_forward_logits_match_the_published_model(family: str) -> None:
    config, params = golden.model(family)
    logits = forward(params, config, jnp.asarray(golden.expected(family)["forward_ids"], jnp.int32))
    np.testing.assert_allclose(logits, golden.expected(family)["forward_logits"], atol=3e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in golden.FOLDERS for name in sorted(golden.cases(family))]
)
def test_tokens_match_the_published_loop(family: str, name: str) -> None:
    case = golden.cases(family)[name]
    prompt = golden.expected(family)["prompt_batch3" if "batch" in case else "prompt"]
    out = _run(family, case, prompt, block_cache=_block_cache(name))
    np.testing.assert_array_equal(out.tokens, golden.expected(family)[name][:, prompt.shape[1] :])
    assert int(out.forward_passes.max()) <= case["nfe"]


@pytest.mark.parametrize("interval", [1, 4])
def test_last_layer_boundary_equals_the_naive_cache(interval: int) -> None:
    config, _ = golden.model("llada")
    case = golden.cases("llada")["bicache_P16_b3_N4"] | {"refresh_interval": interval}
    prompt = golden.expected("llada")["prompt"]
    last, naive = (_run("llada", case, prompt, boundary) for boundary in (config.num_layers - 1, config.num_layers))
    np.testing.assert_array_equal(last.tokens, naive.tokens)


def test_boundary_zero_refreshed_every_step_equals_no_cache() -> None:
    case = golden.cases("llada")["bicache_P16_b0_N1"]
    prompt = golden.expected("llada")["prompt"]
    without = _run("llada", {**case, "prefix_len": 0}, prompt)
    np.testing.assert_array_equal(_run("llada", case, prompt).tokens, without.tokens)
