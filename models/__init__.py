"""Model families: the shared transformer, and one file per family with its config and checkpoint names."""

from bicache_jax.models import a2d as a2d
from bicache_jax.models import dream as dream
from bicache_jax.models import llada as llada
from bicache_jax.models.transformer import AXES as AXES
from bicache_jax.models.transformer import Transformer as Transformer
from bicache_jax.models.transformer import abstract as abstract
from bicache_jax.models.transformer import init as init

FAMILIES = {"llada": llada, "dream": dream, "a2d": a2d}
"""Family modules by name; each has `MODEL_TYPES`, `PUBLISHED_MASK_ID`, `LOOP`, `config_from_hf` and `tensor_map`."""
