"""Diffusion language models, fast, in JAX: BiCache prefix caching for bidirectional attention.

Shapes throughout the library: `B` rows, `G` prefixes, `P` prefix tokens, `U` suffix tokens, `T` queries, `S` keys,
`N` query heads, `K` key/value heads, `H` head size, `D` width, `F` MLP width, `L` layers, `V` vocabulary, `W` positions
of the current block, `R` response tokens. In prose b is the boundary, N the refresh interval, r the prefix ratio.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bicache_jax.core.cache import PrefixCache as PrefixCache
    from bicache_jax.core.config import CacheConfig as CacheConfig
    from bicache_jax.core.config import ModelConfig as ModelConfig
    from bicache_jax.core.config import SamplingConfig as SamplingConfig
    from bicache_jax.core.score import Likelihood as Likelihood
    from bicache_jax.core.score import Score as Score
    from bicache_jax.core.types import BicacheError as BicacheError
    from bicache_jax.core.types import Model as Model
    from bicache_jax.core.types import Request as Request
    from bicache_jax.core.types import Result as Result
    from bicache_jax.functional import Denoised as Denoised
    from bicache_jax.functional import denoise as denoise
    from bicache_jax.functional import encode_prefix as encode_prefix
    from bicache_jax.functional import forward as forward
    from bicache_jax.loading import load_model as load_model
    from bicache_jax.models.family import Family as Family
    from bicache_jax.models.family import register_family as register_family
    from bicache_jax.serving.async_engine import AsyncEngine as AsyncEngine
    from bicache_jax.serving.compilation import use_compilation_cache as use_compilation_cache
    from bicache_jax.serving.engine import Engine as Engine

    __version__: str

_HOME = {
    "PrefixCache": "bicache_jax.core.cache",
    "CacheConfig": "bicache_jax.core.config",
    "ModelConfig": "bicache_jax.core.config",
    "SamplingConfig": "bicache_jax.core.config",
    "AsyncEngine": "bicache_jax.serving.async_engine",
    "Engine": "bicache_jax.serving.engine",
    "Denoised": "bicache_jax.functional",
    "denoise": "bicache_jax.functional",
    "encode_prefix": "bicache_jax.functional",
    "forward": "bicache_jax.functional",
    "load_model": "bicache_jax.loading",
    "Family": "bicache_jax.models.family",
    "register_family": "bicache_jax.models.family",
    "BicacheError": "bicache_jax.core.types",
    "Model": "bicache_jax.core.types",
    "Request": "bicache_jax.core.types",
    "Result": "bicache_jax.core.types",
    "Likelihood": "bicache_jax.core.score",
    "Score": "bicache_jax.core.score",
    "use_compilation_cache": "bicache_jax.serving.compilation",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that `bicache --help` need not wait for jax."""
    if name == "__version__":
        from bicache_jax.core.version import version

        return version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
