"""What notebooks show: canvases that fill in, and tables of results, statistics and accuracy.

`watch(engine.stream(requests))` draws a stream in place in Jupyter, Colab and VS Code, and leaves the last picture in
the saved notebook; anywhere else it prints each answer as it is finished. Plans, statistics and boundary tables need
nothing from here: a notebook shows them as tables by themselves. Figures are in `bicache_jax.measure.plots`.
"""

from __future__ import annotations

import html
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bicache_jax.core.table import Table as Table
from bicache_jax.core.table import mebibytes
from bicache_jax.core.types import HOLE, Key, Record, Result

if TYPE_CHECKING:
    from bicache_jax.serving.engine import Engine

SECONDS = 0.1
"""Least time between two pictures of a canvas; a browser draws no more often than an eye needs."""


class Board:
    """The rows of a stream: what every canvas is drawn from, on whatever it is drawn.

    Attributes:
        live: the rows at work, in the order in which they began.
        done: results that are finished.
    """

    def __init__(self) -> None:
        self.live: dict[Key, Record] = {}
        self.done = 0

    def take(self, record: Record) -> bool:
        """Takes a result, finished or not.

        Returns:
            Whether there is something new to draw: a row is finished, or the last one at work has moved.
        """
        key = (record["id"], record["sample"])
        if record["finish_reason"] is None:
            self.live[key] = record
            return key == next(reversed(self.live))
        self.live.pop(key, None)
        self.done += 1
        return True


def row_name(record: Record) -> str:
    """What a row is called: its request's id, and the number of the sample where it is not the first."""
    return printable(record["id"] + (f"/{record['sample']}" if record["sample"] else ""))


def row_text(record: Record) -> str:
    """A row's text with a hole for each masked position, token ids where there is no tokenizer, or its error."""
    if record["finish_reason"] == "error":
        return str(record["error"])
    if record["text"] is not None:
        return str(record["text"])
    masked = set(record.get("masked", ()))
    return " ".join(HOLE if place in masked else str(token) for place, token in enumerate(record["token_ids"]))


def printable(text: str, keep: str = "") -> str:
    """The text without control characters: a model's output must not steer what shows it."""
    return "".join(
        char if char in keep or unicodedata.category(char) not in ("Cc", "Cf", "Zl", "Zp", "Cs") else " "
        for char in text
    )


class Canvas:
    """A picture of a stream as it is now; a notebook shows it as HTML, anything else as text.

    Rows stay where they first stood, finished ones until others need their place. Grey cells are masked.
    """

    def __init__(self, *, rows: int = 16, total: int | None = None, clock: Callable[[], float] = time.perf_counter):
        """Has seen nothing.

        Args:
            rows: most rows that are drawn; the others are counted.
            total: results that will come, if that is known.
            clock: tells the time.

        Raises:
            ValueError: `rows` is below 1.
        """
        if rows < 1:
            raise ValueError(f"rows must be >= 1, got {rows}")
        self._rows, self._total, self._clock = rows, total, clock
        self._board, self._shown = Board(), dict[Key, Record]()
        self._tokens = 0
        self._begun = clock()
        self._seconds = 0.0

    def take(self, result: Result) -> bool:
        """Takes a result of a stream; returns whether there is something new to draw."""
        record = result.to_record()
        key = (result.id, result.sample)
        if key not in self._shown and len(self._shown) == self._rows:
            old = next((name for name, row in self._shown.items() if row["finish_reason"] is not None), None)
            if old is not None:
                del self._shown[old]
        if key in self._shown or len(self._shown) < self._rows:
            self._shown[key] = record
        if result.finish_reason is not None:
            self._tokens += len(result.decoded)
        self._seconds = self._clock() - self._begun
        return self._board.take(record)

    @property
    def summary(self) -> str:
        """How far the stream is, in one line."""
        of = "" if self._total is None else f" of {self._total:,}"
        work = f", {len(self._board.live):,} at work" if self._board.live else ""
        return f"{self._board.done:,}{of} done{work}; {self._tokens:,} tokens in {self._seconds:.1f} s"

    def __repr__(self) -> str:
        lines = (f"{row_name(row)}  {printable(row_text(row))}" for row in self._shown.values())
        return "\n".join([*lines, self.summary])

    def _repr_html_(self) -> str:
        rows = "".join(map(_row, self._shown.values()))
        return (
            f'<div style="max-width:70em"><style>.bc td{{text-align:left!important;vertical-align:top;padding:2px 8px}}'
            f".bc span{{opacity:.35}}.bc i{{font-style:normal;opacity:.6}}.bc b{{color:#d1491b}}</style>"
            f'<table class="bc">{rows}</table><div style="opacity:.7">{html.escape(self.summary)}</div></div>'
        )


def watch(stream: Iterable[Result], *, rows: int = 16, total: int | None = None) -> list[Result]:
    """Shows a stream while it runs.

    Args:
        stream: what `engine.stream(requests)` returns.
        rows: most rows that are drawn at a time; the others are counted.
        total: results that will come, if the picture is to say so.

    Returns:
        The finished results in the order of completion, once the stream is over.

    Raises:
        ValueError: `rows` is below 1; or what the stream raises, with the picture as it was.
    """
    canvas, found = Canvas(rows=rows, total=total), []
    notebook = in_notebook()
    draw = _in_place(canvas) if notebook else None
    try:
        for result in stream:
            news = canvas.take(result)
            if result.finish_reason is not None:
                found.append(result)
                if not notebook:
                    record = result.to_record()
                    print(f"{row_name(record)}  {printable(row_text(record), keep=chr(10))}", flush=True)
            if draw is not None and news:
                draw(False)
    finally:
        if draw is not None:
            draw(True)
    return found


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which can draw over what it has drawn."""
    ipython = sys.modules.get("IPython")  # not imported: nobody runs a notebook here
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


def _in_place(value: Any) -> Callable[[bool], None]:
    """What draws a value over its last picture; asked to hurry, it draws at once, else every now and then."""
    from IPython.display import display

    handle = display(value, display_id=True)
    last = time.perf_counter()

    def draw(hurry: bool) -> None:
        nonlocal last
        now = time.perf_counter()
        if hurry or now - last >= SECONDS:
            handle.update(value)
            last = now

    return draw


def _row(record: Record) -> str:
    """A row of a canvas as HTML; runs of masked positions are one element, so that pictures stay small."""
    text = html.escape(printable(row_text(record), keep="\n")).replace("\n", "<br>")
    text = re.sub(f"{HOLE}[{HOLE} ]*", lambda found: f"<span>{found[0]}</span>", text)
    if record["finish_reason"] == "error":
        text = f"<b>{text}</b>"
    return f"<tr><td><i>{html.escape(row_name(record))}</i></td><td>{text}</td></tr>"


def results(found: Iterable[Result], *, answers: Mapping[str, Any] | None = None) -> Table:
    """Results as a table, a line each.

    Args:
        found: results, as `engine.generate` and `watch` return them.
        answers: right answers by id, in a column of their own.

    Returns:
        The table: text or error, prefix tokens P, prefix ratio r, boundary b, forward passes, prompt tokens whose
        encoding was there already.
    """
    given = () if answers is None else ("answer",)
    rows = []
    for result in found:
        record = result.to_record()
        answer = [] if answers is None else [_one_of(answers.get(result.id))]
        work = (result.prefix_len, result.prefix_ratio, result.boundary, result.forward_passes, result.cached_tokens)
        rows.append([row_name(record), " ".join(printable(row_text(record)).split()), *answer, *work])
    return Table(("id", "text", *given, "P", "r, %", "b", "passes", "cached"), rows)


def _one_of(answer: Any) -> str | None:
    return " / ".join(map(str, answer)) if isinstance(answer, list | tuple) else answer


def statistics(engine: Engine) -> Table:
    """What an engine has done and keeps, in the numbers that a user of prefix caches looks at.

    Args:
        engine: the engine; `engine.stats` and `engine.prefixes.stats` have all numbers.
    """
    done, kept = engine.stats, engine.prefixes.stats
    asked = kept.hits + kept.misses
    rows = [
        ("responses", done.rows),
        ("tokens", done.tokens),
        ("forward passes", done.forward_passes),
        ("prefixes encoded", done.prefixes_encoded),
        ("prefixes found in the cache", f"{kept.hits:,} of {asked:,}"),
        ("responses served by a prefix that others used", done.prefix_hits),
        ("prefixes kept", f"{kept.entries:,}, {mebibytes(kept.nbytes)} of {mebibytes(kept.budget)}"),
        ("programs compiled", f"{done.compilations:,} in {done.compile_seconds:.1f} s"),
        ("seconds on the device, compilation included", f"{done.seconds:.1f}"),
    ]
    return Table(("", f"policy {engine.cache.policy}"), rows)


def evaluation(found: Sequence[Record]) -> Table:
    """Accuracy and speed of policies as a table.

    Args:
        found: what `bicache_jax.measure.evaluate.evaluate` returns.
    """
    kinds = sorted({kind for result in found for kind in result["by_kind"] if kind})
    rows = []
    for result in found:
        low, high = result["difference_interval"]
        rows.append(
            [
                result["policy"],
                f"{100 * result['exact_match']:.1f} %",
                _or_dash(result["agreement"], lambda value: f"{100 * value:.1f} %"),
                f"{100 * result['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
                f"{result['mcnemar_p']:.2g}",
                _or_dash(result["tokens_per_s"], lambda value: f"{value:.0f}"),
                _or_dash(result["ratio"], lambda value: f"{value:.2f}"),
                _or_dash(result["limit"], lambda value: f"{value:.2f}"),
                str(result["forward_passes"]),
                *(f"{100 * result['by_kind'][kind]['exact_match']:.1f} %" for kind in kinds),
            ]
        )
    heads = ("policy", "exact match", "agreement", "difference (95 %)", "McNemar p", "tokens/s", "ratio", "limit")
    return Table((*heads, "passes", *kinds), rows)


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)
