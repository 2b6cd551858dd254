"""`--stream` on a terminal: the canvases of running rows fill in in place, finished texts scroll away."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

from bicache_jax.core.types import HOLE, Record
from bicache_jax.display import Board, printable, row_name, row_text

_ASCII_HOLE = "_"  # where the terminal's encoding has no other
_UP, _CLEAR, _BOLD, _DIM, _PLAIN = "\x1b[{}F", "\x1b[J", "\x1b[1m", "\x1b[2m", "\x1b[0m"


def is_terminal(stream: Any) -> bool:
    """Whether a stream shows escape sequences."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Canvas:
    """Takes results as they happen and draws them; the rows at work stand at the bottom and are drawn over."""

    def __init__(self, stream: Any = None) -> None:
        """Draws on a terminal, standard output by default."""
        self._stream = stream or sys.stdout
        self._board = Board()
        self._height = 0  # lines that the rows at work take
        self._many = False  # whether they had to take a line each

    def show(self, record: Record) -> None:
        """Draws a result, finished or not."""
        news, live = self._board.take(record), len(self._board.live)
        self._many = live > 1 or (self._many and live > 0)
        if news:
            self._draw("" if record["finish_reason"] is None else self._finished(record))

    def _draw(self, above: str) -> None:
        size = shutil.get_terminal_size()
        lines = list(self._lines(size.columns))
        most = max(1, size.lines - 2)
        if len(lines) > most:  # what has scrolled off the screen cannot be drawn over
            lines = [*lines[: most - 1], f"{_DIM}... {len(self._board.live)} rows at work{_PLAIN}"]
        back = _UP.format(self._height) if self._height else ""
        text = "".join(f"{line}\n" for line in lines)
        self._height = len(lines)
        self._write(f"{back}{_CLEAR}{above}{text}")

    def _lines(self, columns: int) -> Iterator[str]:
        for record in self._board.live.values():
            name, text = row_name(record), printable(row_text(record))
            if self._many:
                room = max(8, columns - _width(name) - 3)
                yield f"{_DIM}{name}{_PLAIN}  {next(wrapped(text, room), '')}"
            else:
                yield f"{_DIM}{name}{_PLAIN}"
                yield from wrapped(text, columns - 1)

    def _finished(self, record: Record) -> str:
        return f"{_BOLD}{row_name(record)}{_PLAIN}  " + printable(row_text(record), keep="\n") + "\n"

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace(HOLE, _ASCII_HOLE).encode(encoding, "replace").decode(encoding)
        self._stream.write(text)
        self._stream.flush()


def _width(text: str) -> int:
    """Columns that a text takes."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in ("W", "F")) for char in text
    )


def wrapped(text: str, columns: int) -> Iterator[str]:
    """The text in pieces of at most `columns`, wide characters counted as two."""
    start, used = 0, 0
    for place, char in enumerate(text):
        width = _width(char)
        if used + width > columns and place > start:
            yield text[start:place]
            start, used = place, 0
        used += width
    if start < len(text):
        yield text[start:]
