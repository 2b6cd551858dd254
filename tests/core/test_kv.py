"""Keys and values in 8 bits: how far each is off, that no token's depend on another's, and what they weigh."""

from __future__ import annotations

import dataclasses
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax.core.config import CACHE_DTYPES
from bicache_jax.core.kv import Quantized, dtype_of, floats, stored, token_bytes, zeros
from bicache_jax.core.quantized import MOST

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_is_off_by_half_a_scale_of_its_token_and_head(dtype: str) -> None:
    sizes = RNG.uniform(0.01, 30, size=(2, 3, 9, 1))  # tokens of very different sizes in one head
    x = jnp.asarray(RNG.normal(size=(2, 3, 9, 24)) * sizes, dtype).at[1, 2, 4].set(0)
    kv = stored(x, "int8")
    assert isinstance(kv, Quantized) and kv.shape == x.shape and kv.scales.shape == (2, 3, 1, 9)
    exact, scales = np.asarray(x, np.float64), np.asarray(kv.scales, np.float64).swapaxes(-1, -2)
    back = np.asarray(kv.values, np.float64) * scales
    assert (np.abs(back - exact) <= scales * 0.5001).all() and not back[1, 2, 4].any()
    peaks = np.abs(exact).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(scales * MOST, np.where(peaks > 0, peaks, MOST), rtol=1e-6)
    np.testing.assert_allclose(floats(kv, jnp.float32), back, rtol=1e-6)
    alone = stored(x[1:, :, 6:7], "int8")  # a token alone is what it is in company
    assert isinstance(alone, Quantized)
    np.testing.assert_array_equal(alone.values, kv.values[1:, :, 6:7])
    np.testing.assert_array_equal(alone.scales, kv.scales[1:, :, :, 6:7])


def test_without_8_bits_nothing_happens() -> None:
    x = jnp.ones((1, 2, 3, 4))
    assert stored(x, "auto") is x and floats(x, jnp.bfloat16) is x and dtype_of(x) == "auto"


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_arrays(dtype: str, cache_dtype: Any) -> None:
    config = golden.model("dream")[0]
    made = jax.eval_shape(lambda: zeros((5, 3, config.num_kv_heads, 7, config.head_dim), dtype, cache_dtype))
    nbytes = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
    assert nbytes == 5 * 3 * 7 * token_bytes(config, jnp.dtype(dtype).itemsize, cache_dtype)
    wide = dataclasses.replace(config, head_dim=128)  # LLaDA's and Dream's
    assert token_bytes(wide, 2, "int8") == 132 / 256 * token_bytes(wide, 2, "auto")
