"""Loading a model: the one place that knows families, checkpoints, tokenizers and bundled files together."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bicache_jax.checkpoints.eight_bits import eight_bits_of, scale_path, with_scales, without_format
from bicache_jax.checkpoints.fields import TensorMap, read_ids, read_json
from bicache_jax.checkpoints.orbax_folder import OrbaxFolder, is_orbax
from bicache_jax.checkpoints.other_formats import refuse_other_formats, unknown_model_type
from bicache_jax.checkpoints.safetensors_folder import SafetensorsFolder
from bicache_jax.checkpoints.targets import Target, targets
from bicache_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from bicache_jax.checkpoints.tree import paths, tree_of
from bicache_jax.configs import device_of, model_shape, published_table
from bicache_jax.core.boundary import load_table
from bicache_jax.core.config import DTYPES, QUANTIZE, ModelConfig, Quantize
from bicache_jax.core.device import LEAST_CAPABILITY, compute_capability
from bicache_jax.core.quantized import quantise
from bicache_jax.core.types import BicacheError, Model
from bicache_jax.models import Family, family_for, family_of, registered
from bicache_jax.sharding import MODEL, Partition, check_mesh, param_shardings
from bicache_jax.sharding.partition import axes_of

EXAMPLE = "example"
TABLE_FILE = "boundary_table.json"


def resolve_dtype(dtype: Any) -> jnp.dtype:
    """`auto` is float32 on CPU, float16 on GPUs that have no bfloat16, and bfloat16 elsewhere.

    Raises:
        BicacheError: the dtype is none of `auto`, `float32`, `bfloat16`, `float16`.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        dtype = _native_dtype(jax.devices()[0])
    elif isinstance(dtype, str) and dtype not in DTYPES:
        raise BicacheError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    resolved = jnp.dtype(dtype)
    if resolved.name not in DTYPES:
        raise BicacheError(f"dtype must be one of {', '.join(DTYPES)}, got {resolved.name!r}")
    return resolved


def _native_dtype(device: Any) -> str:
    """What models are loaded in where nobody says: by the device's data, or by what it says of itself."""
    if device.platform == "cpu":
        return "float32"
    known, capability = device_of(device.device_kind), compute_capability(device)
    if known is not None:
        return known.dtype
    return "float16" if capability is not None and capability < LEAST_CAPABILITY else "bfloat16"


def find_folder(path: str | Path) -> Path:
    """The checkpoint folder: a local path, `example` for the bundled model, or a hub id to download.

    Raises:
        BicacheError: there is no such folder and it cannot be downloaded.
    """
    if str(path) == EXAMPLE:  # a folder of that name is ./example
        return Path(str(importlib.resources.files("bicache_jax") / "data" / "example"))
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise BicacheError(f"{path}: not a folder; name the folder that holds config.json and *.safetensors")
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise BicacheError(f"{path}: no such folder; name a checkpoint folder, a hub id (owner/name) or 'example'")
    try:
        import huggingface_hub
    except ImportError:
        raise BicacheError(
            f"{path}: no such folder; to download it as a hub id install the extra: pip install 'bicache-jax[hub]'"
        ) from None
    try:
        wanted = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds; each is a reason in its first line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BicacheError(f"{path}: no such folder, and the hub download failed: {reason}") from None


def open_checkpoint(folder: Path) -> SafetensorsFolder | OrbaxFolder:
    """The tensors of a checkpoint folder, in whichever of the two formats it is.

    Raises:
        BicacheError: they cannot be read.
    """
    return OrbaxFolder(folder) if is_orbax(folder) else SafetensorsFolder(folder, eight_bits_of(folder))


def tensor_map(config: ModelConfig) -> TensorMap:
    """Where the parameters of a model are in a checkpoint in Hugging Face layout."""
    family = family_for(config)
    eight = (path for path, leaf in paths(family.abstract(config)) if leaf.dtype == jnp.int8)
    return with_scales(family.tensors(config), eight)


def load_model(
    path: str | Path,
    *,
    dtype: Any = "auto",
    mask_id: int | None = None,
    block_causal: bool = False,
    right_shift_logits: bool = False,
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
    check_weights: bool = False,
) -> Model:
    """Loads a checkpoint.

    Args:
        path: folder with `config.json` and `*.safetensors` (tokenizer files optional), an orbax folder written by
            `bicache convert`, a hub id, or `example`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`, in which weights beyond 65,504 are refused.
        mask_id: replaces the checkpoint's mask token (iLLaDA-8B needs 5).
        block_causal: it was trained with block-causal attention, though its config does not say so: A2D models that
            were trained as BD3LM.
        right_shift_logits: position j is predicted from hidden state j - 1, likewise.
        quantize: format of the weights (`bicache_jax.core.quantized`): `none`, `w8` or `w8a8`; one parameter at a time
            is brought to it, so that the model is never there as floats. None: as they are stored.
        mesh: mesh to load onto (`bicache_jax.sharding.make_mesh`): each process reads only the parts that its devices
            hold, and `params` has the sizes of `bicache_jax.sharding.Partition`. None: the default device.
        check_weights: look for NaN and infinity in every tensor, and refuse a model that holds any.

    Returns:
        The model.

    Raises:
        BicacheError: one line that names the file and the fault.
    """
    folder = find_folder(path)
    refuse_other_formats(folder)
    source = folder / "config.json"
    fields = without_format(read_json(source))
    family, model_type = family_of(fields), fields.get("model_type")
    if family is None or family.config_from_hf is None:
        known = ", ".join(dict.fromkeys(t for f in registered().values() for t in f.model_types))
        raise BicacheError(unknown_model_type(source, fields, known))
    tokenizer = load_tokenizer(folder)
    mask = _mask_token(fields, family, tokenizer, mask_id, source)
    with open_checkpoint(folder) as tensors:
        try:
            config = family.config_from_hf({**fields, **mask}, tensors.names, str(source))
            if block_causal and not config.block_causal:
                pad = fields.get("pad_token_id")
                if pad is None and tokenizer is not None:
                    pad = tokenizer.core.token_to_id(tokenizer.special.get("pad_token", ""))
                config = dataclasses.replace(config, **_block_causal(family, model_type, source), pad_id=pad)
            if right_shift_logits:
                config = dataclasses.replace(config, shift_logits=True)
        except ValueError as error:
            raise BicacheError(f"{source}: {error}") from None
        if config.family != family.name:
            raise BicacheError(f"{source}: family {family.name!r} read it as one of {config.family!r}")
        config = dataclasses.replace(config, quantize=_format(quantize, tensors.quantize, folder))
        stored = dataclasses.replace(config, quantize=tensors.quantize)
        params = tensors.load(
            tensor_map(stored),
            _targets(stored, resolve_dtype(dtype), mesh),
            check=check_weights,
            finish=_Shrink(stored, config, mesh),
        )
        mark = tensors.mark(fields)
    named = {*config.eos_ids, *_generation_ends(folder), *(tokenizer.eos_ids if tokenizer else ())}
    ends = {i for i in named if 0 <= i < config.vocab_size}
    turns = ends.intersection(tokenizer.eot_ids if tokenizer else ()).difference(config.eos_ids)
    config = dataclasses.replace(config, eos_ids=tuple(sorted(ends)), eot_ids=tuple(sorted(turns)))
    boundaries, note = _own_table(folder, config, mark)
    if config.quantize != "none":
        mark = f"{mark}+{config.quantize}"
    return Model(config, params, tokenizer, mark, str(path), boundaries, note)


def _format(asked: str | None, stored: Quantize, folder: Path) -> Quantize:
    """The format of weights to load.

    Raises:
        BicacheError: it is unknown, or the weights are stored in another one that is not floats.
    """
    if asked is None:
        return stored
    if asked not in QUANTIZE:
        raise BicacheError(f"quantize must be one of {', '.join(QUANTIZE)}, got {asked!r}")
    formats = {word: word for word in QUANTIZE}
    if stored != "none" and asked == "none":
        raise BicacheError(f"{folder}: its weights are stored in 8 bits ({stored}); load the checkpoint they are from")
    return formats[asked]


class _Shrink:
    """Brings a parameter that has been loaded to the format that the model is to have."""

    def __init__(self, stored: ModelConfig, config: ModelConfig, mesh: Mesh | None) -> None:
        self._paths: dict[tuple[str, ...], Any] = {}
        self._shardings: dict[tuple[str, ...], Any] = {}
        if stored.quantize != "none" or config.quantize == "none":
            return
        family = family_for(config)
        shapes = family.abstract(config)
        self._paths = {path: leaf for path, leaf in paths(shapes) if leaf.dtype == jnp.int8}
        if not self._paths:
            raise BicacheError(f"quantize: models of family {family.name!r} have no form in 8 bits")
        if mesh is not None:
            padded = Partition(config, check_mesh(mesh).shape[MODEL]).config
            self._shardings = dict(paths(param_shardings(family.axes(padded), family.abstract(padded), mesh)))

    def __call__(self, path: tuple[str, ...], array: jax.Array) -> list[tuple[tuple[str, ...], jax.Array]]:
        """The parameter, or its integers and their scales."""
        if path not in self._paths:
            return [(path, array)]
        places = (path, scale_path(path))
        run = jax.jit(
            quantise,
            static_argnames="axis",
            donate_argnums=0,
            out_shardings=tuple(map(self._shardings.get, places)) if self._shardings else None,
        )
        with warnings.catch_warnings():  # integers do not fit into the floats' memory
            warnings.simplefilter("ignore", UserWarning)
            return list(zip(places, run(array, axis=-2 if path[-1] == "kernel" else -1), strict=True))


def _block_causal(family: Family, model_type: Any, source: Path) -> Mapping[str, Any]:
    """How a family is decoded where it was trained with block-causal attention.

    Raises:
        BicacheError: it never is.
    """
    if family.block_causal is None:
        raise BicacheError(f"{source}: models of type {model_type!r} have full attention: leave block-causal out")
    return family.block_causal


def _mask_token(
    fields: Mapping[str, Any], family: Family, tokenizer: Tokenizer | None, given: int | None, source: Path
) -> dict[str, int]:
    """The mask token as a field, where it is given, or where a family's files name it in their tokenizer only.

    Raises:
        BicacheError: nothing names it.
    """
    if given is not None:
        return {"mask_token_id": given}
    if fields.get("mask_token_id") is not None:
        return {}
    if family.mask_id is not None:
        return {"mask_token_id": family.mask_id}
    if tokenizer is not None:
        given = tokenizer.core.token_to_id(tokenizer.special.get("mask_token", ""))
    if given is None:
        raise BicacheError(f"{source}: nothing here names the mask token: give its id (--mask-id, mask_id)")
    return {"mask_token_id": given}


def _targets(config: ModelConfig, dtype: jnp.dtype, mesh: Mesh | None) -> dict[str, Any]:
    """Where the parameters go."""
    family = family_for(config)
    shapes = family.abstract(config, dtype)
    if mesh is None:
        return targets(shapes)
    partition = Partition(config, check_mesh(mesh).shape[MODEL])
    table = family.axes(partition.config)
    shardings = dict(paths(param_shardings(table, family.abstract(partition.config, dtype), mesh)))

    def sources(path: tuple[str, ...], leaf: Any) -> tuple[Any, ...]:
        return tuple(map(partition.source, axes_of(table, path, leaf.ndim)))

    return tree_of(
        (path, Target(leaf.shape, leaf.dtype, shardings[path], sources(path, leaf))) for path, leaf in paths(shapes)
    )


def _generation_ends(folder: Path) -> tuple[int, ...]:
    """Ends of text that only `generation_config.json` names, often one more than `config.json`."""
    file = folder / "generation_config.json"
    return read_ids(read_json(file), "eos_token_id", str(file)) if file.is_file() else ()


def random_model(shape: str, *, dtype: Any = "auto", seed: int = 0, quantize: Quantize = "none") -> Model:
    """A model of a published shape with random weights, for measurements that no weight changes.

    Args:
        shape: a published one, such as `llada_8b`, `dream_7b`, `qwen3_0_6b`, `sdar_4b` or `llada2_mini`; or `small` or
            `small_blocks` (block-causal), which run on CPUs, or `tiny`, whose work takes no time.
        dtype: as in `load_model`.
        seed: of the weights.
        quantize: their format.

    Returns:
        The model. A shape without a published boundary table gets LLaDA-8B's, scaled to its depth.

    Raises:
        BicacheError: the shape is unknown.
    """
    config = dataclasses.replace(model_shape(shape), quantize=quantize)
    make = jax.jit(family_for(config).init, static_argnums=(0, 2))
    params = make(config, jax.random.key(seed), resolve_dtype(dtype))
    if config.block_causal:
        return Model(config, params, name=f"random {shape}")
    table = published_table(config)
    if table is not None:
        return Model(config, params, name=f"random {shape}", boundaries=table.table)
    whole = published_table(model_shape("llada_8b"))
    assert whole is not None
    scaled = {ratio: round(b * config.num_layers / whole.num_layers) for ratio, b in whole.table.items()}
    return Model(config, params, name=f"random {shape}", boundaries=scaled)


def _own_table(folder: Path, config: ModelConfig, mark: str) -> tuple[Mapping[int, int] | None, str]:
    """The table that was made for this checkpoint, or the one published for its architecture."""
    own = folder / TABLE_FILE
    if own.is_file():
        table = load_table(own)
        if table.fingerprint == mark:
            return table.table, ""
        raise BicacheError(f"{own}: made for another checkpoint; make a new one with 'bicache profile' or remove it")
    published = published_table(config)
    if published is None:
        return None, ""
    note = f"no boundary table was made for this checkpoint; using the one published for {published.model}"
    return published.table, note
