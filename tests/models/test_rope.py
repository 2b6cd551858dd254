"""Rotary embedding: both ways to compute it give the same numbers, and each platform gets its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax.models import rope


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 0.0)])
def test_the_product_gives_what_the_halves_give(dtype: str, bound: float) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 50, 32), jnp.dtype(dtype))
    angle = jax.random.uniform(jax.random.key(1), (2, 1, 50, 16), maxval=300.0)
    found, wanted = (run(x, jnp.cos(angle), jnp.sin(angle)) for run in (rope.by_product, rope.by_halves))
    assert found.dtype == wanted.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), atol=bound, rtol=0)


def test_the_matrix_unit_is_used_on_tpus_alone() -> None:
    x, positions = jax.ShapeDtypeStruct((1, 2, 8, 32), jnp.bfloat16), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    rotate = jax.jit(lambda x, positions: rope.rotate(x, positions, 1e4))
    for platform in ("cpu", "cuda", "tpu"):
        text = rotate.trace(x, positions).lower(lowering_platforms=(platform,)).as_text()
        assert ("dot_general" in text) == (platform == "tpu")
