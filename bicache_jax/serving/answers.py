"""Whether responses are right, for requests that say what would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bicache_jax.core.types import Record, Request
from bicache_jax.serving.inputs import Requests


def accepted(answer: Any) -> tuple[str, ...]:
    """Answers that count as right, of a request's `answer` field: one, or a list of them; none if it has none."""
    if answer is None or isinstance(answer, dict):
        return ()
    return tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """The response is one of the answers, white space aside."""
    return text.split() in [answer.split() for answer in answers]


def accuracy(records: Sequence[Record], requests: Requests) -> tuple[int, int] | None:
    """How many responses equal their request's `answer`, or one of a list of them, white space aside.

    Args:
        records: all results, in input order.
        requests: the input.

    Returns:
        (right ones, responses with a known answer), or None where nothing can be compared.
    """
    answers = {}
    for item, answer in zip(requests.items, requests.notes("answer"), strict=True):
        if isinstance(item, Request) and accepted(answer):
            answers[item.id] = accepted(answer)
    scored = [
        record["text"] is not None and exact_match(record["text"], answers[record["id"]])
        for record in records
        if record["id"] in answers and (record["text"] is not None or record["finish_reason"] == "error")
    ]
    if not any(record["text"] is not None for record in records) or not scored:
        return None
    return sum(scored), len(scored)
