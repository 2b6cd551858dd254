"""Messages for folders that cannot be loaded: what each one contains and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bicache_jax.checkpoints.fields import read_json
from bicache_jax.checkpoints.known_fields import DEQUANTISE
from bicache_jax.checkpoints.orbax_folder import MANIFEST
from bicache_jax.core.types import BicacheError

_PICKLES = ("pytorch_model*.bin", "consolidated*.pth", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MERGE = (
    "merge it into its base model first, with peft:"
    " AutoPeftModel.from_pretrained(folder, trust_remote_code=True).merge_and_unload().save_pretrained(new_folder)"
)
_SAVE = "save the model as safetensors first: model.save_pretrained(new_folder, safe_serialization=True)"

# Suffixes of tensor names in quantised checkpoints, and the methods that write them.
_QUANTISED: Mapping[str, str] = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or compressed-tensors",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
}
_QUANTISED_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}

CAUSAL = frozenset(
    "bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 falcon gemma gemma2 gemma3 gemma3_text glm glm4 gpt2"
    " gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite internlm2 llama llama4 mamba mamba2 mistral mixtral mpt olmo"
    " olmo2 opt phi phi3 qwen qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next smollm3 stablelm starcoder2".split()
)
"""`model_type` of models that generate text from left to right."""


def refuse_other_formats(folder: Path) -> None:
    """Rejects a folder that does not hold a model's checkpoint, or that contains an adapter.

    Raises:
        BicacheError: the message names the format and what to do.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        settings = read_json(adapter)
        kind, base = settings.get("peft_type") or "LoRA", settings.get("base_model_name_or_path")
        of = f" of {base}" if base else ""
        beside = " beside a model" if (folder / "config.json").is_file() else ""
        raise BicacheError(f"{folder}: holds a {kind} adapter{of} ({adapter.name}){beside}: {_MERGE}")
    if (folder / "model_index.json").is_file():
        raise BicacheError(f"{folder}: a diffusers pipeline (model_index.json), not a language model")
    for file, method in _QUANTISED_FILES.items():
        if (folder / file).is_file():
            raise BicacheError(f"{folder}: a checkpoint quantised by {method} ({file}): {DEQUANTISE}")
    if not (folder / "config.json").is_file():
        raise BicacheError(f"{folder}: {_without_config(folder)}")


def no_weights(folder: Path) -> str:
    """Message for a folder with `config.json` and no safetensors file."""
    if found := _first(folder, _PICKLES):
        return f"its weights are pickled ({found}), which is never read, since it may run any code: {_SAVE}"
    if found := _first(folder, ("*.gguf",)):
        return f"its weights are in GGUF ({found}), which is not read: name the checkpoint in Hugging Face layout"
    if found := _first(folder, ("*.msgpack", "*.h5")):
        return f"its weights are Flax's or TensorFlow's ({found}), which are not read: {_SAVE}"
    return "no *.safetensors file in it; download the weights, too"


def not_safetensors(file: Path, reason: object) -> str:
    """Message for a file that should be safetensors and is not."""
    try:
        with file.open("rb") as opened:
            if opened.read(64).startswith(b"version https://git-lfs"):
                return f"{file}: a pointer of Git LFS, not the file itself: run 'git lfs pull' in the folder"
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror})"
    return f"{file}: not a readable safetensors file ({reason}); download it again"


def refuse_quantised(folder: Path, names: frozenset[str]) -> None:
    """Rejects a checkpoint with quantised tensors.

    Raises:
        BicacheError: the message names the method and a tensor.
    """
    for suffix, method in _QUANTISED.items():
        if found := min((name for name in names if name.endswith(suffix)), default=None):
            raise BicacheError(f"{folder}: a checkpoint quantised by {method} (tensor {found}): {DEQUANTISE}")


def unknown_model_type(source: Path, fields: Mapping[str, Any], known: str) -> str:
    """Message for a model of an unsupported family.

    Args:
        source: the `config.json`.
        fields: its fields.
        known: the supported families.
    """
    model_type = fields.get("model_type")
    if model_type is None:
        return f"{source}: field 'model_type' is missing, supported: {known}"
    if str(model_type).lower() in CAUSAL:
        return (
            f"{source}: model_type is {model_type!r}, a causal language model, which writes from left to right; this is"
            f" for diffusion language models, supported: {known}"
        )
    return f"{source}: model_type is {model_type!r}, supported: {known}"


def _first(folder: Path, patterns: tuple[str, ...]) -> str:
    return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))), "")


def _without_config(folder: Path) -> str:
    inside = sorted(path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/config.json"))
    if inside:
        more = f" (or another of {len(inside)})" if len(inside) > 1 else ""
        return f"no config.json in it, but in a folder inside: name {inside[0]}{more}"
    for patterns, what in {
        ("*.gguf",): "a model in GGUF ({}), which is not read: name the checkpoint in Hugging Face layout",
        _PICKLES: "pickled weights ({}) without a config.json, which are never read, since a pickle may run any code: "
        + _SAVE,
        ("*.safetensors",): "weights ({}) without a config.json: put the model's config.json beside them",
        (MANIFEST,): "written by 'bicache convert', but without its config.json ({}): convert the model again",
        ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"): "an orbax checkpoint ({}) that 'bicache convert' did"
        " not write: name a checkpoint in Hugging Face layout",
    }.items():
        if found := _first(folder, patterns):
            return what.format(found)
    return "no config.json in it; name the folder that holds config.json and *.safetensors"
