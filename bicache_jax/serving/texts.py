"""Where a text ends: at an end-of-text token, at a stop string, or at the request's `max_tokens`; what fills a hole."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from bicache_jax.core.config import ModelConfig
from bicache_jax.core.types import Filled, Request, Tokenizer

_BEFORE = 8
"""Tokens in front of a hole that decide how its text goes on: enough to tell whether a space belongs between them."""


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a canvas.

    Attributes:
        text: the text, with a hole for each masked position; None without a tokenizer.
        length: number of decoded tokens that it covers.
        ended: whether an end-of-text token or a stop string ended it before the end of the canvas, or of a hole.
        holes: of a template, what its holes were filled with.
    """

    text: str | None
    length: int
    ended: bool
    holes: tuple[Filled, ...] = ()


def read_text(tokens: Sequence[int], request: Request, config: ModelConfig, tokenizer: Tokenizer | None) -> Text:
    """Reads a canvas, finished or not.

    Args:
        tokens: the response [gen_length]; of a template all from its first hole on.
        request: the request.
        config: the architecture, which defines the end-of-text and mask tokens.
        tokenizer: the model's tokenizer, if it has one.
    """
    if request.holes:
        return _read_template(tokens, request, config, tokenizer)
    allowed = tokens[: request.max_tokens]
    ended = _first_end(allowed, config)
    length = len(allowed) if ended is None else ended
    if tokenizer is None:
        return Text(None, length, ended is not None)
    text, length, stopped = _cut(lambda length: tokenizer.canvas(allowed[:length], config.mask_id), length, request)
    return Text(text, length, stopped or ended is not None)


def _first_end(tokens: Sequence[int], config: ModelConfig) -> int | None:
    """Place of the first end of text."""
    return next((index for index, token in enumerate(tokens) if token in config.eos_ids), None)


def _cut(text_of: Callable[[int], str], length: int, request: Request) -> tuple[str, int, bool]:
    """A text up to the first stop string, the tokens that it takes, and whether there is one.

    Args:
        text_of: text of so many tokens.
        length: tokens of the whole text.
        request: it has the stop strings.
    """
    text = text_of(length)
    found = min((start for stop in request.stop if (start := text.find(stop)) >= 0), default=None)
    if found is None:
        return text, length, False
    whole = lambda length: any(stop in text_of(length) for stop in request.stop)  # noqa: E731
    return text[:found], bisect.bisect_left(range(length + 1), True, key=whole), True


def _read_template(tokens: Sequence[int], request: Request, config: ModelConfig, tokenizer: Tokenizer | None) -> Text:
    """`read_text` for a template: what fills its holes, and the whole of it."""
    lead, mask_id = request.lead, config.mask_id
    ids = [*request.prompt_ids[:lead], *tokens]
    kept, written = list(ids[:lead]), request.template[0] if request.template else ""
    holes, covered, ended, at = list[Filled](), 0, False, lead
    for index, (place, length) in enumerate(request.holes):
        kept += ids[at:place]
        at = place + length
        filled, before = tuple(ids[place:at]), tuple(kept[-_BEFORE:])
        end = _first_end(filled, config)
        ended |= end is not None
        used = length if end is None or not request.trim else end
        text = None
        if tokenizer is not None:
            spaced = bool(request.template) and (not written or written[-1].isspace())
            added = _added(tokenizer, before, filled, mask_id, spaced=spaced)
            text, used, stopped = _cut(added, used, request)
            ended |= stopped
            written += text + (request.template[index + 1] if request.template else "")
        holes.append(Filled(filled, text))
        kept += filled[:used]
        covered += used
    if tokenizer is None:
        return Text(None, covered, ended, tuple(holes))
    whole = written if request.template else tokenizer.canvas([*kept, *ids[at:]], mask_id)
    return Text(whole, covered, ended, tuple(holes))


def _added(
    tokenizer: Tokenizer, before: Sequence[int], filled: Sequence[int], mask_id: int, *, spaced: bool
) -> Callable[[int], str]:
    """The text that so many tokens of a hole add to the tokens in front of it.

    Args:
        tokenizer: the tokenizer.
        before: tokens in front.
        filled: tokens of the hole.
        mask_id: the mask token.
        spaced: whether the text in front ends with white space, which a tokenizer of words drops: the space that it
            then puts between two words is there already.
    """
    base = tokenizer.canvas(before, mask_id)

    def text_of(length: int) -> str:
        text = tokenizer.canvas([*before, *filled[:length]], mask_id)
        text = text[len(base) :] if text.startswith(base) else tokenizer.canvas(filled[:length], mask_id)
        return text.removeprefix(" ") if spaced and base and not base[-1].isspace() else text

    return text_of
