"""Where a text ends: at an end-of-text token, at a stop string, or at the request's `max_tokens`."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

from bicache_jax.core.config import ModelConfig
from bicache_jax.core.types import Request, Tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a canvas.

    Attributes:
        text: the text, with a hole for each masked position; None without a tokenizer.
        length: number of canvas tokens that it covers.
        ended: whether an end-of-text token or a stop string ended it before the end of the canvas.
    """

    text: str | None
    length: int
    ended: bool


def read_text(tokens: Sequence[int], request: Request, config: ModelConfig, tokenizer: Tokenizer | None) -> Text:
    """Reads a canvas, finished or not.

    Args:
        tokens: the response [gen_length].
        request: the request.
        config: the architecture, which defines the end-of-text and mask tokens.
        tokenizer: the model's tokenizer, if it has one.
    """
    allowed = tokens[: request.max_tokens]
    ended = next((index for index, token in enumerate(allowed) if token in config.eos_ids), None)
    length = len(allowed) if ended is None else ended
    if tokenizer is None:
        return Text(None, length, ended is not None)

    def text_of(length: int) -> str:
        return tokenizer.canvas(allowed[:length], config.mask_id)

    text = text_of(length)
    found = min((start for stop in request.stop if (start := text.find(stop)) >= 0), default=None)
    if found is None:
        return Text(text, length, ended is not None)
    whole = lambda length: any(stop in text_of(length) for stop in request.stop)  # noqa: E731
    return Text(text[:found], bisect.bisect_left(range(length + 1), True, key=whole), True)
