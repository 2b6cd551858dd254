"""Templates: known text with holes in it, as known tokens and the places of the holes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from bicache_jax.core.config import ModelConfig
from bicache_jax.core.types import Tokenizer
from bicache_jax.serving.fields import BadRequest, encodable, is_int, shown
from bicache_jax.serving.prompts import shared_length

_PIECES = re.compile(r"\{\{|\}\}|\{mask:([0-9]+)\}|[{}]")
_FORM = "a hole is {mask:N}, N tokens of it, and a brace of the text is doubled: {{ or }}"
_DIGITS = 12
"""Digits of a length that are read: no canvas is as long."""


@dataclasses.dataclass(frozen=True)
class Template:
    """A template as tokens.

    Attributes:
        known: its known tokens, in order.
        holes: first position and length of each hole, in the filled sequence.
        texts: texts in front of, between and behind the holes; none where it came as tokens.
    """

    known: tuple[int, ...]
    holes: tuple[tuple[int, int], ...]
    texts: tuple[str, ...] = ()

    def behind(self, ids: Sequence[int]) -> Template:
        """The template behind other tokens."""
        holes = tuple((place + len(ids), length) for place, length in self.holes)
        return Template((*ids, *self.known), holes, self.texts)


def _split(value: Any, field: str) -> tuple[list[str], list[int]]:
    """Texts of a template, one more than its holes, and the lengths of these.

    Raises:
        BadRequest: it is neither a text with holes nor a list of texts and lengths, or it has no hole.
    """
    texts, lengths = [""], list[int]()

    def hole(length: int) -> None:
        if length < 1:
            raise BadRequest(f"a hole of {field!r} must have at least 1 token, hole {len(lengths) + 1} has {length}")
        lengths.append(length)
        texts.append("")

    if isinstance(value, str):
        at = 0
        for found in _PIECES.finditer(value):
            texts[-1] += value[at : found.start()]
            at = found.end()
            if found[1] is not None:
                hole(int(found[1][:_DIGITS]))
            elif len(found[0]) == 2:
                texts[-1] += found[0][0]
            else:
                part = value[found.start() : found.start() + 16]
                raise BadRequest(f"{field!r} has {shown(part)} at character {found.start()}: {_FORM}")
        texts[-1] += value[at:]
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for piece in value:
            if is_int(piece):
                hole(int(piece))
            elif isinstance(piece, str):
                texts[-1] += piece
            else:
                raise BadRequest(f"{field!r} as a list must hold texts and lengths of holes, got {shown(piece)}")
    else:
        raise BadRequest(f"{field!r} must be a text, or a list of texts and lengths of holes, got {shown(value)}")
    if not lengths:
        raise BadRequest(f"{field!r} has no hole: {_FORM}")
    encodable("".join(texts), field)
    return texts, lengths


def text_template(
    value: Any, tokenizer: Tokenizer | None, config: ModelConfig, *, alone: bool = True, field: str = "template"
) -> Template:
    """A template in words.

    Its texts are tokenised one by one, so that a hole begins and ends with a token. Special tokens that the tokenizer
    puts around a text are put around the whole template.

    Args:
        value: a text with `{mask:N}` for a hole of N tokens, braces doubled; or a list of texts and lengths of holes.
        tokenizer: the model's tokenizer.
        config: the architecture, which limits the length and defines the mask token.
        alone: whether it is a text of its own, and not the end of a conversation.
        field: what messages call it.

    Raises:
        BadRequest: it is no template, it is too long, its text holds mask tokens, or there is no tokenizer.
    """
    texts, lengths = _split(value, field)
    if tokenizer is None:
        raise BadRequest(f"the model has no tokenizer files; give 'template_ids' instead of {field!r}")
    if sum(lengths) > config.max_length:  # before room is made for it
        raise BadRequest(f"the holes of {field!r} have {sum(lengths)} tokens, the model at most {config.max_length}")
    around, encoded = tokenizer.encode(""), [tokenizer.encode(text) for text in texts]
    before = min(shared_length(around, ids) for ids in encoded)  # special tokens in front of a text; the others follow
    after = len(around) - before
    known, holes, place = list[int](), list[tuple[int, int]](), 0
    for index, ids in enumerate(encoded):
        ends = slice(
            0 if alone and index == 0 else before,
            len(ids) if alone and index == len(lengths) else len(ids) - after,
        )
        known += ids[ends]
        place += len(ids[ends])
        if index < len(lengths):
            holes.append((place, lengths[index]))
            place += lengths[index]
    if config.mask_id in known:
        raise BadRequest(f"the text of {field!r} holds the model's mask token: {_FORM}")
    return Template(tuple(known), tuple(holes), tuple(texts))


def token_template(ids: Sequence[int], config: ModelConfig) -> Template:
    """A template of token ids: each run of mask tokens is a hole.

    Raises:
        BadRequest: it has no mask token.
    """
    holes, place = [], 0
    for masked, run in groupby(ids, key=lambda token: token == config.mask_id):
        length = len(list(run))
        if masked:
            holes.append((place, length))
        place += length
    if not holes:
        raise BadRequest(f"'template_ids' has no hole: a hole is a run of the mask token, {config.mask_id}")
    return Template(tuple(token for token in ids if token != config.mask_id), tuple(holes))
