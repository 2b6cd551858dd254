"""Model families: the shared transformer, and one file per family with its config and checkpoint names."""

from types import ModuleType

from bicache_jax.models import a2d as a2d
from bicache_jax.models import dream as dream
from bicache_jax.models import llada as llada
from bicache_jax.models import llada2 as llada2
from bicache_jax.models import llada_moe as llada_moe
from bicache_jax.models import sdar as sdar
from bicache_jax.models.family import Family as Family
from bicache_jax.models.family import abstract as abstract
from bicache_jax.models.family import family_for as family_for
from bicache_jax.models.family import family_of as family_of
from bicache_jax.models.family import register_family as register_family
from bicache_jax.models.family import registered as registered
from bicache_jax.models.transformer import AXES as AXES
from bicache_jax.models.transformer import Transformer as Transformer
from bicache_jax.models.transformer import axes as axes
from bicache_jax.models.transformer import init as init

MODULES: dict[str, ModuleType] = {
    "llada": llada,
    "llada_moe": llada_moe,
    "dream": dream,
    "a2d": a2d,
    "sdar": sdar,
    "llada2": llada2,
}
"""Modules of the families here, by name; each has `MODEL_TYPES`, `PUBLISHED_MASK_ID`, `LOOP`, `config_from_hf` and
`tensor_map`, and may have `BLOCK_CAUSAL` and `is_mine` (see `Family`)."""

for _name, _module in MODULES.items():
    register_family(
        Family(
            _name,
            Transformer,
            init,
            _module.MODEL_TYPES,
            _module.config_from_hf,
            _module.tensor_map,
            _module.PUBLISHED_MASK_ID,
            getattr(_module, "BLOCK_CAUSAL", None),
            getattr(_module, "is_mine", None),
        ),
        replace=True,  # the module may be reloaded
    )
