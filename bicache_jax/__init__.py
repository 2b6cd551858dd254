"""Diffusion language models, fast, in JAX: BiCache prefix caching for bidirectional attention.

Shapes throughout the library: `B` rows, `G` prefixes, `P` prefix tokens, `U` suffix tokens, `T` queries, `S` keys,
`N` query heads, `K` key/value heads, `H` head size, `D` width, `F` MLP width, `L` layers, `V` vocabulary, `W` positions
of the current block, `R` response tokens. In prose b is the boundary, N the refresh interval, r the prefix ratio.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bicache_jax.cache import PrefixCache as PrefixCache
    from bicache_jax.config import CacheConfig as CacheConfig
    from bicache_jax.config import ModelConfig as ModelConfig
    from bicache_jax.config import SamplingConfig as SamplingConfig
    from bicache_jax.engine import Engine as Engine
    from bicache_jax.functional import Denoised as Denoised
    from bicache_jax.functional import denoise as denoise
    from bicache_jax.functional import encode_prefix as encode_prefix
    from bicache_jax.functional import forward as forward
    from bicache_jax.loading import load_model as load_model
    from bicache_jax.types import BicacheError as BicacheError
    from bicache_jax.types import Model as Model
    from bicache_jax.types import Request as Request
    from bicache_jax.types import Result as Result

_HOME = {
    "PrefixCache": "bicache_jax.cache",
    "CacheConfig": "bicache_jax.config",
    "ModelConfig": "bicache_jax.config",
    "SamplingConfig": "bicache_jax.config",
    "Engine": "bicache_jax.engine",
    "Denoised": "bicache_jax.functional",
    "denoise": "bicache_jax.functional",
    "encode_prefix": "bicache_jax.functional",
    "forward": "bicache_jax.functional",
    "load_model": "bicache_jax.loading",
    "BicacheError": "bicache_jax.types",
    "Model": "bicache_jax.types",
    "Request": "bicache_jax.types",
    "Result": "bicache_jax.types",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `bicache --help` need not wait for jax."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
