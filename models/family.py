"""Families of models: what one consists of, and the registry in which checkpoints and configurations find theirs.

The registry is the library's only table that grows while a process runs. It is looked up on the host alone, when a
model is loaded and when a program is built: what is compiled holds the backbone itself, not a name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bicache_jax.checkpoints.fields import TensorMap
from bicache_jax.core.attention import prefix_attention
from bicache_jax.core.backbone import PIECES, MakeBackbone, Params, Table, lacking
from bicache_jax.core.config import ModelConfig
from bicache_jax.core.types import BicacheError

ReadConfig = Callable[[Mapping[str, Any], frozenset[str], str], ModelConfig]
"""Reads a `config.json`: its fields, the checkpoint's tensor names, and the file's name for messages."""
Init = Callable[..., Params]
"""Random parameters: `(config, key, dtype)`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model: how it computes, and how its checkpoints are read.

    Attributes:
        name: what `ModelConfig.family` says.
        backbone: makes the backbone of a configuration.
        init: random parameters for a configuration, a key and a dtype, all three positional. Shapes follow from it
            (`jax.eval_shape`), also where a checkpoint is loaded.
        model_types: the `model_type`s of a `config.json` that are of this family, in lower case. None: it has no
            checkpoints.
        config_from_hf: reads a `config.json`. A `ValueError` or `BicacheError` is reported with the file's name.
        tensor_map: names of the checkpoint's tensors, by path in the parameter tree.
        mask_id: the mask token where a `config.json` names none; None: the tokenizer or the caller names it.
        block_causal: fields of `ModelConfig` for checkpoints that were trained with block-causal attention without
            saying so (`load_model(..., block_causal=True)`); None: there are none such.
        is_mine: tells from a `config.json` of one of `model_types` whether it is of this family, where another has the
            same type; None: all are.
    """

    name: str
    backbone: MakeBackbone
    init: Init
    model_types: tuple[str, ...] = ()
    config_from_hf: ReadConfig | None = None
    tensor_map: Callable[[ModelConfig], TensorMap] | None = None
    mask_id: int | None = None
    block_causal: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    is_mine: Callable[[Mapping[str, Any]], bool] | None = None

    def __post_init__(self) -> None:
        faults = []
        if not self.name:
            faults.append("name must not be empty")
        if isinstance(self.model_types, str) or any(word != word.lower() for word in self.model_types):
            faults.append(f"model_types must be a tuple of lower-case words, got {self.model_types!r}")
        for name in ("backbone", "init", "config_from_hf", "tensor_map", "is_mine"):
            value, needed = getattr(self, name), name in ("backbone", "init")
            if not callable(value) and (value is not None or needed):
                faults.append(f"{name} must be callable, got {value!r:.80}")
            elif value is None and self.model_types and name in ("config_from_hf", "tensor_map"):
                faults.append(f"{name} is missing: with model_types there are checkpoints to read")
        if isinstance(self.backbone, type) and (missing := lacking(self.backbone, PIECES)):
            faults.append(missing)
        if faults:
            raise BicacheError(f"family {self.name!r}: {'; '.join(faults)}")

    def abstract(self, config: ModelConfig, dtype: Any = jnp.float32) -> Params:
        """Shapes and dtypes of the parameters without computing them; loaders and shardings follow this declaration."""

        def made(key: Array) -> Params:
            return self.init(config, key, jnp.dtype(dtype))

        return jax.eval_shape(made, jax.random.key(0))

    def axes(self, config: ModelConfig) -> Table | None:
        """Logical axes of the parameters, by path."""
        return self.backbone(config, prefix_attention, None).axes

    def tensors(self, config: ModelConfig) -> TensorMap:
        """Where the parameters of a model are in a checkpoint in Hugging Face layout.

        Raises:
            BicacheError: the family has no checkpoints.
        """
        if self.tensor_map is None:
            raise BicacheError(f"family {self.name!r} has no tensor_map, so its checkpoints cannot be read or written")
        return self.tensor_map(config)


_REGISTERED: dict[str, Family] = {}


def register_family(family: Family, *, replace: bool = False) -> Family:
    """Makes a family known to `load_model`, to engines and to the functional layer of this process.

    Args:
        family: the family. Those of the library are registered in the same way when it is imported.
        replace: take the place of a family of the same name, as when a cell of a notebook runs again.

    Returns:
        The family.

    Raises:
        TypeError: it is not a `Family`.
        BicacheError: its name is taken, or one of its `model_types` is another family's and it has no `is_mine`.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family must be a Family, got {family!r:.80}")
    if family.name in _REGISTERED and not replace:
        raise BicacheError(
            f"family {family.name!r} is registered already: give it another name, or replace=True to take its place"
        )
    for other in _REGISTERED.values():
        shared = sorted(set(family.model_types).intersection(other.model_types))
        if shared and other.name != family.name and family.is_mine is None and other.is_mine is None:
            raise BicacheError(
                f"family {family.name!r}: model_type {shared[0]!r} is of family {other.name!r} already: give it"
                " is_mine, which tells from a config.json whether it is its own"
            )
    _REGISTERED[family.name] = family
    return family


def registered() -> Mapping[str, Family]:
    """All families, by name."""
    return dict(_REGISTERED)


def family_of(fields: Mapping[str, Any]) -> Family | None:
    """The family of a `config.json`; None if there is none. Those that look at more than the type are asked first."""
    model_type = str(fields.get("model_type")).lower()
    mine = [family for family in _REGISTERED.values() if model_type in family.model_types]
    asked = [family for family in mine if family.is_mine is not None and family.is_mine(fields)]
    return next(iter(asked + [family for family in mine if family.is_mine is None]), None)


def family_for(config: ModelConfig) -> Family:
    """The family of a configuration.

    Raises:
        BicacheError: there is no family of its name.
    """
    found = _REGISTERED.get(config.family)
    if found is None:
        raise BicacheError(
            f"no family is called {config.family!r} (known: {', '.join(_REGISTERED)}): register it with"
            " bicache_jax.register_family, or give the class of its backbone as backbone="
        )
    return found


def abstract(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """`Family.abstract` of a configuration's family."""
    return family_for(config).abstract(config, dtype)
