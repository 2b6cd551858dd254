"""Tokenizers of checkpoints: `tokenizer.json` with the `tokenizers` library, or a byte-level BPE from older files.

A checkpoint without tokenizer files still runs on `prompt_ids`. No code from a checkpoint is executed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from bicache_jax.checkpoints.chat_template import render
from bicache_jax.checkpoints.fields import read_json
from bicache_jax.core.types import HOLE, BicacheError

_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
_END_TOKENS = (*_TURN_ENDS, "<|endoftext|>")
# The pattern by which Qwen2 splits text before byte-level BPE; published with its tokenizer.
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

    @property
    def eot_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn of a chat, by their names in LLaDA and Dream."""
        return tuple(index for token in _TURN_ENDS if (index := self.core.token_to_id(token)) is not None)

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids of a text; `special` adds the special tokens that the tokenizer puts around a text."""
        return tuple(self.core.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.core.decode(list(ids), skip_special_tokens=True)

    def canvas(self, ids: Sequence[int], mask_id: int) -> str:
        """Text of an unfinished canvas: a `HOLE` for each masked position, the rest decoded."""
        pieces, known = [], list[int]()
        for masked, group in groupby(ids, key=lambda token: token == mask_id):
            run = list(group)
            if masked:
                pieces.append(HOLE * len(run))
                continue
            # The text that a run adds to the text before it, so that word-level decoders keep the space between them.
            before, text = self.decode(known), self.decode(known + run)
            pieces.append(text[len(before) :] if text.startswith(before) else self.decode(run))
            known += run
        return "".join(pieces)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True) -> str:
        """Renders the chat template.

        Args:
            messages: the conversation.
            generate: end with the start of the assistant's answer.

        Raises:
            ValueError: there is no template, or it rejects the messages.
        """
        if self.template is None:
            raise ValueError("the model has no chat template; use 'prompt' or 'prompt_ids'")
        return render(self.template, messages, self.special, generate=generate)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], *, generate: bool = True) -> tuple[int, ...]:
        """Token ids of a conversation; the template adds all special tokens."""
        return self.encode(self.chat_text(messages, generate=generate), special=False)


def _content(token: Any) -> str | None:
    """A special token, given as a string or as an object with its `content`."""
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


@dataclasses.dataclass(frozen=True)
class _Added:
    """A token that is added to the vocabulary."""

    content: str
    index: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False

    def token(self) -> tokenizers.AddedToken:
        flags = {name: getattr(self, name) for name in ("lstrip", "rstrip", "normalized", "single_word")}
        return tokenizers.AddedToken(self.content, special=self.special, **flags)


def _added(folder: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> list[_Added]:
    """Added tokens in order of id, from `tokenizer_config.json` or, in older layouts, `added_tokens.json`.

    Raises:
        BicacheError: an entry is not a token with an id.
    """
    listed, file = settings.get("added_tokens_decoder"), folder / "tokenizer_config.json"
    found = []
    try:
        if listed is None:
            file = folder / "added_tokens.json"
            contents = read_json(file) if file.is_file() else {}
            named = {*special.values(), *map(_content, settings.get("additional_special_tokens") or [])}
            listed = {index: {"content": token, "special": token in named} for token, index in contents.items()}
        for index, entry in listed.items():
            flags = {
                field.name: bool(entry[field.name])
                for field in dataclasses.fields(_Added)
                if field.type == "bool" and field.name in entry
            }
            found.append(_Added(str(entry["content"]), int(index), **flags))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BicacheError(f"{file}: added tokens must have the form {{id: {{'content': text, ...}}}}") from None
    return sorted(found, key=lambda token: token.index)


def _byte_level_bpe(folder: Path, added: Sequence[_Added]) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from its vocabulary and merges, as in Dream's checkpoints."""
    vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    # The library numbers added tokens after the vocabulary. Tokens inside it keep the ids from the files.
    vocabulary |= {token.content: token.index for token in added}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_tokens([token.token() for token in added])
    return core


def _settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, plus special tokens that are only in `special_tokens_map.json`."""
    files = [folder / "special_tokens_map.json", folder / "tokenizer_config.json"]
    merged: dict[str, Any] = {}
    for file in files:
        if file.is_file():
            merged |= {name: value for name, value in read_json(file).items() if value is not None}
    return merged


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None if it has no tokenizer files.

    Raises:
        BicacheError: a tokenizer file cannot be read; the message names it.
    """
    folder = Path(folder)
    file, settings = folder / "tokenizer.json", _settings(folder)
    special = {name: text for name, token in settings.items() if name.endswith("_token") and (text := _content(token))}
    try:
        if file.is_file():
            core = tokenizers.Tokenizer.from_file(str(file))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            file = folder / "vocab.json"
            core = _byte_level_bpe(folder, _added(folder, settings, special))
        else:
            return None
    except BicacheError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise BicacheError(f"{file}: not a tokenizer that the tokenizers library can read ({error})") from None
    ends = dict.fromkeys([special.get("eos_token", ""), *_END_TOKENS])
    eos_ids = tuple(index for token in ends if (index := core.token_to_id(token)) is not None)
    return Tokenizer(core, _template(settings, folder), special, eos_ids)
