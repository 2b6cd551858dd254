"""Model families: the shared transformer, and one file per family with its config and checkpoint names."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from bicache_jax.models import a2d as a2d
from bicache_jax.models import dream as dream
from bicache_jax.models import llada as llada
from bicache_jax.models import llada2 as llada2
from bicache_jax.models import llada_moe as llada_moe
from bicache_jax.models import sdar as sdar
from bicache_jax.models.transformer import AXES as AXES
from bicache_jax.models.transformer import Transformer as Transformer
from bicache_jax.models.transformer import abstract as abstract
from bicache_jax.models.transformer import axes as axes
from bicache_jax.models.transformer import init as init

FAMILIES = {
    "llada_moe": llada_moe,
    "llada": llada,
    "dream": dream,
    "a2d": a2d,
    "sdar": sdar,
    "llada2": llada2,
}
"""Family modules by name; each has `MODEL_TYPES`, `PUBLISHED_MASK_ID`, `LOOP`, `config_from_hf` and `tensor_map`.

One whose type is also another's has `is_mine`, which says from a `config.json` whether it is its own, and comes first.
"""


def family_of(fields: Mapping[str, Any]) -> ModuleType | None:
    """The family of a `config.json`; None if there is none."""
    model_type = str(fields.get("model_type")).lower()
    for family in FAMILIES.values():
        is_mine = getattr(family, "is_mine", None)
        if model_type in family.MODEL_TYPES and (is_mine is None or is_mine(fields)):
            return family
    return None
