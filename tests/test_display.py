"""What notebooks show: text outside of them, escaped HTML, one display handle for all pictures of a canvas."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import pytest

from bicache_jax import display
from bicache_jax.core.boundary import BoundaryTable
from bicache_jax.core.table import Table
from bicache_jax.core.types import HOLE, Result
from bicache_jax.serving.stats import Stats
from bicache_jax.serving.store import PrefixStats

EVIL = "<script>alert('&')</script>"


def frame(name: str, text: str | None, **fields: Any) -> Result:
    return Result(name, text=text, token_ids=(5, 9), finish_reason=None, masked=(1,), **fields)


def done(name: str, text: str | None, **fields: Any) -> Result:
    return Result(name, text=text, token_ids=(5, 9), **fields)


def test_outside_notebooks_answers_are_lines_of_text(capsys):
    assert not display.in_notebook()
    stream = [frame("a", f"x{HOLE}"), frame("b", HOLE), done("b", "two\nlines"), done("a", "xy\x1b[2J")]
    assert [result.id for result in display.watch(iter(stream))] == ["b", "a"]
    assert capsys.readouterr().out == "b  two\nlines\na  xy [2J\n"


@pytest.fixture
def notebook(monkeypatch):
    """Stands for a kernel with its notebook; holds the pictures that each display handle has shown."""
    shown: list[list[str]] = []

    class Handle:
        def __init__(self) -> None:
            self.pictures: list[str] = []
            shown.append(self.pictures)

        def update(self, value: Any) -> None:
            self.pictures.append(value._repr_html_())

    def show(value: Any, *, display_id: bool) -> Handle:
        assert display_id is True
        handle = Handle()
        handle.update(value)
        return handle

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    inside = types.ModuleType("IPython.display")
    inside.display = show  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", inside)
    monkeypatch.setattr(display, "SECONDS", 0.0)
    return shown


def test_a_canvas_is_drawn_over_in_one_place(notebook, capsys):
    stream = [frame("a", HOLE * 2), frame("a", f"x{HOLE}"), done("a", "xy")]
    display.watch(stream, total=1)
    (pictures,) = notebook
    assert len(pictures) == 5 and capsys.readouterr().out == ""
    assert f"<span>{HOLE * 2}</span>" in pictures[1] and f"x<span>{HOLE}</span>" in pictures[2]
    assert ">xy<" in pictures[-1] and "<span>" not in pictures[-1] and "1 of 1 done; 2 tokens" in pictures[-1]


def test_what_was_drawn_stays_when_the_stream_fails(notebook):
    def failing():
        yield frame("a", HOLE)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        display.watch(failing())
    assert HOLE in notebook[0][-1]


def test_a_terminal_of_ipython_is_no_notebook(monkeypatch):
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert not display.in_notebook()


def test_html_is_escaped_everywhere():
    canvas = display.Canvas()
    canvas.take(done(EVIL, EVIL))
    canvas.take(Result("bad", finish_reason="error", error=EVIL))
    plan_like = Table((EVIL,), [(EVIL,)], above=(EVIL,), below=(EVIL,))
    results = display.results([done(EVIL, EVIL)], answers={EVIL: [EVIL, EVIL]})
    table = BoundaryTable(EVIL, "", 2, 0.97, 1, {50: 1})
    for value in (canvas, plan_like, results, table):
        assert EVIL not in value._repr_html_() and "&lt;script&gt;" in value._repr_html_()


def test_a_canvas_holds_few_rows_and_counts_the_others():
    canvas = display.Canvas(rows=2, clock=iter(range(99)).__next__)
    for name in "abcd":
        canvas.take(frame(name, HOLE))
    assert canvas._repr_html_().count("<tr>") == 2 and "0 done, 4 at work" in canvas.summary
    canvas.take(done("a", "text"))
    canvas.take(frame("c", "later"))  # takes the place of a row that is done
    assert repr(canvas).splitlines() == [f"b  {HOLE}", "c  later", "1 done, 3 at work; 2 tokens in 6.0 s"]
    with pytest.raises(ValueError, match="rows"):
        display.Canvas(rows=0)


def test_a_big_canvas_is_a_small_page():
    canvas = display.Canvas()
    for number in range(64):
        canvas.take(frame(f"question {number}", HOLE * 256))
    assert len(canvas._repr_html_().encode()) < 16 * 1024 + 2000  # three bytes a hole, and little around them


def test_tables_are_text_markdown_and_html():
    table = Table(("name", "count"), [("a|b", 1234), ("c", 1.5), ("d", None)], above=("over",), below=("under",))
    assert str(table).splitlines() == ["over", "", "name  count", "a|b   1,234", "c      1.50", "d", "", "under"]
    assert table.markdown().splitlines()[2:5] == ["| name | count |", "| --- | --- |", "| a\\|b | 1,234 |"]
    page = table._repr_html_()
    assert '<td style="text-align:left">a|b</td><td style="text-align:right;white-space:nowrap">1,234</td>' in page
    assert "color" not in page.replace("nowrap", "")  # the theme's own
    with pytest.raises(ValueError, match="2 cells"):
        Table(("name", "count"), [("a",)])


def test_counts_are_tables_by_themselves():
    assert ">12<" in Stats(rows=12)._repr_html_() and ">forward passes<" in Stats()._repr_html_()
    assert ">2.0 MiB<" in PrefixStats(nbytes=2**21)._repr_html_()


def test_results_show_what_the_cache_did():
    found = [done("q", "a  b", prefix_len=7, prefix_ratio=70, boundary=3, forward_passes=4, cached_tokens=7)]
    found.append(Result("bad", finish_reason="error", error="too long"))
    table = display.results(found, answers={"q": ["a b", "b a"]})
    assert table.rows[0] == ["q", "a b", "a b / b a", 7, 70, 3, 4, 7] and table.rows[1][:3] == ["bad", "too long", None]


def test_a_plan_is_short_wherever_it_is_shown(capsys):
    from bicache_jax import Engine, load_model

    engine = Engine(load_model("example"))
    plan = engine.plan([{"prompt": f"Mara lives in Oslo . who lives in {town}"} for town in ("Oslo", "Rome")])
    assert repr(plan) == plan.describe() and len(repr(plan)) < 1500
    page = plan._repr_html_()
    assert "expected gain" in page and ">cache MiB<" in page and len(page) < 4000
    assert json.dumps(plan.to_json()) and plan.peak is not None
    assert "responses" in str(display.statistics(engine))
