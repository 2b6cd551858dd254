"""The specification of prefix attention against float64 NumPy on the concatenated keys and values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax.core import attention
from bicache_jax.kernels import prefix_attention
from bicache_jax.testing import BOUNDS, reference_attention


def _inputs(
    rng: np.random.Generator, rows: int, prefixes: int, heads: int, kv: int, sizes: tuple[int, int, int]
) -> list:
    prefix, queries, suffix = sizes
    shapes = [(rows, heads, queries, 16), *[(prefixes, kv, prefix, 16)] * 2, *[(rows, kv, suffix, 16)] * 2]
    return [rng.normal(size=shape) for shape in shapes]


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(
    ("rows", "prefixes", "heads", "kv", "sizes"),
    [(3, 2, 4, 4, (8, 5, 5)), (4, 1, 4, 2, (7, 3, 9)), (2, 2, 6, 1, (0, 4, 4)), (3, 3, 2, 2, (5, 1, 6))],
)
def test_it_is_attention_over_both_parts(
    dtype: str, rows: int, prefixes: int, heads: int, kv: int, sizes: tuple[int, int, int]
) -> None:
    rng = np.random.default_rng(rows)
    inputs = _inputs(rng, rows, prefixes, heads, kv, sizes)
    index = rng.permutation(np.arange(rows) % prefixes)
    prefix_len = rng.integers(0, sizes[0] + 1, prefixes)
    valid = rng.random((rows, sizes[2])) < 0.7
    valid[0] = False  # with an empty prefix: a row with nothing to attend to
    prefix_len[index[0]] = 0
    cast = [jnp.asarray(array, dtype) for array in inputs]
    rounded = [np.asarray(array, np.float64) for array in cast]
    out = prefix_attention(
        *cast,
        prefix_index=jnp.asarray(index, jnp.int32),
        prefix_len=jnp.asarray(prefix_len, jnp.int32),
        suffix_valid=jnp.asarray(valid),
    )
    assert out.dtype == dtype
    wanted = reference_attention(rounded, index, prefix_len, valid)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])
    assert not np.asarray(out[0], np.float64).any()


def test_a_layer_of_a_stack_and_a_prefix_of_ones_own() -> None:
    rng = np.random.default_rng(1)
    q, k_prefix, v_prefix, k, v = (jnp.asarray(a, jnp.float32) for a in _inputs(rng, 2, 2, 2, 2, (4, 3, 3)))
    lengths, valid = jnp.asarray([4, 2], jnp.int32), jnp.ones((2, 3), bool)

    def stacked(layer: jax.Array) -> jax.Array:
        k_stack, v_stack = jnp.stack([v_prefix, k_prefix]), jnp.stack([k_prefix, v_prefix])
        return prefix_attention(q, k_stack, v_stack, k, v, prefix_len=lengths, suffix_valid=valid, layer=layer)

    order = jnp.asarray([0, 1], jnp.int32)
    plain = prefix_attention(q, k_prefix, v_prefix, k, v, prefix_index=order, prefix_len=lengths, suffix_valid=valid)
    np.testing.assert_array_equal(jax.jit(stacked)(jnp.asarray(1)), plain)


def test_tiles_of_queries_that_do_not_come_out_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", {"cpu": 160, "accelerator": 160})
    rng = np.random.default_rng(2)
    inputs = _inputs(rng, 2, 1, 4, 2, (6, 11, 10))
    assert attention._tiles(2, 22, 16) == (1, 8)
    index, lengths, valid = np.zeros(2, int), np.asarray([5]), rng.random((2, 10)) < 0.7
    out = attention.prefix_attention(
        *[jnp.asarray(array, jnp.float32) for array in inputs],
        prefix_index=jnp.asarray(index, jnp.int32),
        prefix_len=jnp.asarray(lengths, jnp.int32),
        suffix_valid=jnp.asarray(valid),
    )
    wanted = reference_attention(inputs, index, lengths, valid)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=2e-6, rtol=2e-6)


def test_an_unknown_implementation_is_refused() -> None:
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(a, jnp.float32) for a in _inputs(rng, 1, 1, 2, 2, (4, 3, 3))]
    with pytest.raises(ValueError, match="implementation"):
        prefix_attention(
            *arrays, prefix_len=jnp.asarray([4]), suffix_valid=jnp.ones((1, 3), bool), implementation="magic"
        )
