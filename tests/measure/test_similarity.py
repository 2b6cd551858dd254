from __future__ import annotations

import golden
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax.measure.similarity import layer_similarity
from bicache_jax.wiring import backbone_for


@pytest.mark.parametrize("prefix_len", [16, 30])
def test_similarity_matches_the_recorded_one(prefix_len: int) -> None:
    config, params = golden.model("llada")
    ids = jnp.asarray(golden.expected("llada")["forward_ids"], jnp.int32)
    padded = jnp.pad(ids, ((0, 0), (0, 7)))
    found = layer_similarity(
        backbone_for(config),
        params,
        padded,
        jnp.asarray([ids.shape[1]], jnp.int32),
        jnp.asarray([prefix_len], jnp.int32),
        prefix_bucket=32,
    )
    np.testing.assert_allclose(found[0], golden.expected("llada")[f"similarity_P{prefix_len}"], atol=1e-4, rtol=0)
