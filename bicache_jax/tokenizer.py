"""Tokenizers of checkpoints: `tokenizer.json` by the `tokenizers` library, chat templates in jinja2's sandbox.

A checkpoint without tokenizer files still runs on `prompt_ids`. Nothing of a checkpoint is executed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, normalizers, pre_tokenizers

from bicache_jax.checkpoint import read_json
from bicache_jax.types import BicacheError

_END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|endoftext|>")
# How Qwen2 splits text before byte-level BPE; published with its tokenizer.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        core: the tokenizer.
        template: chat template, jinja source; None if the checkpoint has none.
        special: special tokens that templates refer to (`bos_token`, `eos_token`, ...).
        eos_ids: tokens that end a text.
    """

    core: tokenizers.Tokenizer
    template: str | None
    special: Mapping[str, str]
    eos_ids: tuple[int, ...]

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids of a text; `special` adds the tokens that the tokenizer puts around every text."""
        return tuple(self.core.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.core.decode(list(ids), skip_special_tokens=True)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True) -> str:
        """Renders the chat template.

        Args:
            messages: the conversation.
            generate: end with the opening of the assistant's answer.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        if self.template is None:
            raise ValueError("the model has no chat template; use 'prompt' or 'prompt_ids'")
        try:
            return (
                _environment()
                .from_string(self.template)
                .render(
                    messages=[dict(message) for message in messages], add_generation_prompt=generate, **self.special
                )
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None
        except Exception as error:  # a template is data of the checkpoint and may fail in any way
            raise ValueError(f"the chat template fails on the messages: {type(error).__name__}: {error}") from None

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True) -> tuple[int, ...]:
        """Token ids of a conversation; the template holds every special token there is."""
        return self.encode(self.chat_text(messages, generate=generate), special=False)


def _environment() -> jinja2.Environment:
    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def dump(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)

    loops = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    environment.filters["tojson"] = dump
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _content(token: Any) -> str | None:
    """A special token stands as a string, or as an object with its `content`."""
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) else None


def _template(settings: Mapping[str, Any], folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BicacheError(f"{file}: cannot be read as text ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise BicacheError(f"{folder / 'tokenizer_config.json'}: field 'chat_template' must be text")
    return template


def _byte_level_bpe(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from its vocabulary and merges, as Dream's checkpoints have it."""
    core = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    added = settings.get("added_tokens_decoder")
    if isinstance(added, Mapping):
        for _, token in sorted(added.items(), key=lambda item: int(item[0])):
            flags = {name: bool(token.get(name, False)) for name in ("lstrip", "rstrip", "normalized", "single_word")}
            core.add_tokens([tokenizers.AddedToken(token["content"], special=bool(token.get("special")), **flags)])
    return core


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None if it has no tokenizer files.

    Raises:
        BicacheError: a tokenizer file cannot be read; the message names it.
    """
    folder = Path(folder)
    config_file, file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    settings = read_json(config_file) if config_file.is_file() else {}
    try:
        if file.is_file():
            core = tokenizers.Tokenizer.from_file(str(file))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            file = folder / "vocab.json"
            core = _byte_level_bpe(folder, settings)
        else:
            return None
    except Exception as error:  # the library raises bare exceptions
        raise BicacheError(f"{file}: not a tokenizer that the tokenizers library can read ({error})") from None
    special = {name: text for name, token in settings.items() if name.endswith("_token") and (text := _content(token))}
    ends = dict.fromkeys([special.get("eos_token", ""), *_END_TOKENS])
    eos_ids = tuple(index for token in ends if (index := core.token_to_id(token)) is not None)
    return Tokenizer(core, _template(settings, folder), special, eos_ids)
