"""What makes a response right: scorers by name, and those of users."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence

from bicache_jax.core.types import BicacheError
from bicache_jax.serving.answers import exact_match as exact_match

Scorer = Callable[[str, Sequence[str]], bool]


def _last_number(text: str) -> float | None:
    found = re.findall(r"(?:(?<![\w.,])-)?\d[\d,]*(?:\.\d+)?", text)  # 3-5 are two numbers, neither negative
    return float(found[-1].replace(",", "")) if found else None


def numeric_match(text: str, answers: Sequence[str]) -> bool:
    """The last number of the response equals an answer (as GSM8K is scored; thousands separators allowed)."""
    value = _last_number(text)
    return value is not None and value in map(_last_number, answers)


# In the order in which they are believed; "I think" and "A man" name no choice as long as another letter does.
_CHOICES = (
    r"(?i:answer)\W*(?:(?i:is)\b)?\W*([A-J])\b",
    r"\(([A-J])\)",
    r"^\W*([A-J])(?=\s*(?:[).:,]|$))",
    r"\b([B-HJ])\b",
    r"\b([AI])\b",
)


def choice_match(text: str, answers: Sequence[str]) -> bool:
    """The letter from A to J that the response chooses is the answer's: "answer is B", "(B)", "B." or a lone B."""
    found = next((match[1] for pattern in _CHOICES if (match := re.search(pattern, text))), None)
    return found is not None and found in [answer.strip().strip("().").upper() for answer in answers]


SCORERS: Mapping[str, Scorer] = {"exact": exact_match, "numeric": numeric_match, "choice": choice_match}


def find_scorer(name: str) -> Scorer:
    """A scorer by name, or by import path `package.module:function`.

    Raises:
        BicacheError: there is none of that name.
    """
    if name in SCORERS:
        return SCORERS[name]
    module, _, function = name.partition(":")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module is the user's: it may fail in any way
        known = ", ".join(SCORERS)
        raise BicacheError(
            f"scorer {name!r}: neither one of {known} nor importable as module:function"
            f" ({type(error).__name__}: {error})"
        ) from None
    if not callable(scorer):
        raise BicacheError(f"scorer {name!r}: not a function (text, answers) -> bool")
    return scorer
