"""What the user is told on standard error: a progress bar while it runs, and one line at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from bicache_jax.core.types import Record
from bicache_jax.serving.answers import accuracy
from bicache_jax.serving.inputs import Requests


class Progress:
    """A bar over finished results, on terminals only."""

    def __init__(self, requests: Requests, resumed: int, *, quiet: bool) -> None:
        from tqdm import tqdm

        self._bar: tqdm[Any] = tqdm(
            total=sum(request.n for request in requests.valid),
            initial=resumed,
            unit="result",
            file=sys.stderr,
            leave=False,  # the closing line says it all
            disable=quiet or not sys.stderr.isatty(),
        )

    def update(self) -> None:
        """One more result."""
        self._bar.update()

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()


def closing_line(records: Sequence[Record], requests: Requests, stats: Any, resumed: int) -> str:
    """The run in one line.

    Args:
        records: all results, in input order.
        requests: the input.
        stats: the engine's counts (of this run alone).
        resumed: results taken from a journal.

    Returns:
        The line.
    """
    errors = sum(record["finish_reason"] == "error" for record in records)
    boundaries = sorted({record["boundary"] for record in records if record["prefix_len"]})
    done = f"{count(len(records), 'result')} for {count(len(requests.items), 'request')}"
    notes = [count(errors, "error")] * bool(errors) + [f"{resumed} from the journal"] * bool(resumed)
    parts = [f"{done} ({', '.join(notes)})" if notes else done]
    scored = accuracy(records, requests)
    if scored is not None:
        right, total = scored
        parts.append(f"accuracy {right / total:.3f} ({right} of {total})")
    if stats.tokens:
        decoding = max(stats.seconds - stats.compile_seconds, 1e-9)
        parts.append(
            f"{stats.tokens} tokens in {stats.seconds:.1f} s, {stats.compile_seconds:.1f} s of them compilation:"
            f" {stats.tokens / decoding:.0f} tokens/s without it"
        )
    saved = f" ({stats.passes_saved} saved by early stops)" if stats.passes_saved else ""
    parts.append(f"{stats.forward_passes} forward passes{saved}, {count(stats.prefix_hits, 'prefix hit')}")
    if boundaries:
        first, last = boundaries[0], boundaries[-1]
        parts.append(f"boundary {first}" if first == last else f"boundary {first} to {last}")
    return f"bicache: {'; '.join(parts)}"


def count(number: int, thing: str) -> str:
    """So many things, in words."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
