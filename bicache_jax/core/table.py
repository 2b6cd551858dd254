"""Tables for people: one value that is text on a terminal, Markdown in a file and HTML in a notebook."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_EMPTY = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Table:
    """Rows under heads, with what is said above and below them.

    A notebook shows it as HTML, which has no colours of its own and so suits dark and light themes.

    Attributes:
        heads: a name for each column.
        rows: cells, as many as there are heads. Numbers get thousands separators, floats two digits; None is empty.
        above: lines before the table.
        below: lines behind it.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    above: Sequence[str] = ()
    below: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heads):
                raise ValueError(f"a row must have {len(self.heads)} cells, got {row!r:.80}")

    def __str__(self) -> str:
        lines = [list(self.heads), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        put = [str.rjust if right else str.ljust for right in self._right()]
        aligned = ("  ".join(f(cell, n) for f, cell, n in zip(put, line, widths, strict=True)) for line in lines)
        return "\n".join([*_apart(self.above, before=False), *(line.rstrip() for line in aligned), *_apart(self.below)])

    def __repr__(self) -> str:
        return str(self)

    def markdown(self) -> str:
        """The table in Markdown; bars and new lines inside cells are kept from ending them."""
        lines = [list(self.heads), ["---"] * len(self.heads), *self._cells()]
        told = (" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) for line in lines)
        return "\n".join([*_apart(self.above, before=False), *(f"| {line} |" for line in told), *_apart(self.below)])

    def _repr_html_(self) -> str:
        sides = ["right" if right else "left" for right in self._right()]

        def line(tag: str, cells: Iterable[str]) -> str:
            marked = zip(cells, sides, strict=True)
            return f"<tr>{''.join(_cell(tag, cell, side) for cell, side in marked)}</tr>"

        def told(lines: Sequence[str]) -> str:
            return "".join(f"<div>{html.escape(text)}</div>" for text in lines)

        body = "".join(line("td", cells) for cells in self._cells())
        table = f"<table><thead>{line('th', self.heads)}</thead><tbody>{body}</tbody></table>"
        return f"<div>{told(self.above)}{table}{told(self.below)}</div>"

    def _cells(self) -> list[list[str]]:
        return [[_written(value) for value in row] for row in self.rows]

    def _right(self) -> list[bool]:
        """Which columns hold numbers, and are set to the right."""
        columns = zip(*self._cells(), strict=True) if self.rows else ((),) * len(self.heads)
        return [all(not cell or cell.lstrip("+-")[:1].isdigit() for cell in column) for column in columns]


def fields_table(value: Any, shown: Callable[[str, Any], Any] = lambda name, number: number) -> Table:
    """A dataclass of counts as a table of names and values.

    Args:
        value: the dataclass.
        shown: what to show for a field, by its name and value.
    """
    fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return Table(
        (type(value).__name__, _EMPTY), [(name.replace("_", " "), shown(name, count)) for name, count in fields]
    )


def mebibytes(nbytes: float | None) -> str | None:
    """Bytes in MiB."""
    return None if nbytes is None else f"{nbytes / 2**20:,.1f} MiB"


def _apart(lines: Sequence[str], *, before: bool = True) -> list[str]:
    """Lines with an empty one between them and the table, if there are any."""
    if not lines:
        return []
    return [_EMPTY, *lines] if before else [*lines, _EMPTY]


def _cell(tag: str, text: str, side: str) -> str:
    whole = ";white-space:nowrap" if side == "right" else ""
    return f'<{tag} style="text-align:{side}{whole}">{html.escape(text)}</{tag}>'


def _written(value: Any) -> str:
    if value is None:
        return _EMPTY
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
