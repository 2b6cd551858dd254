"""The canvas on a terminal: what a reader of escape sequences sees in the end, and on the way."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import write_requests

from bicache_jax.cli import canvas
from bicache_jax.cli.canvas import Canvas, printable, wrapped
from bicache_jax.core.types import HOLE

FAKE = [sys.executable, str(Path(__file__).parents[1].joinpath("fake_run.py")), "generate", "--model", "fake"]


def record(name: str, text: str | None, **fields) -> dict:
    defaults = {"id": name, "sample": 0, "text": text, "token_ids": [5, 9], "finish_reason": None, "masked": [1]}
    return defaults | fields


def screen(data: str) -> list[str]:
    """The lines that stand on a terminal after `data`: cursor up and clear downwards are all that is used."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[\d*[A-Za-z]|\n)", data):
        up = re.fullmatch(r"\x1b\[(\d+)F", part)
        if up:
            row -= int(up[1])
            assert row >= 0
        elif part == "\x1b[J":
            del lines[row:]
            lines.append("")
        elif part == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif not part.startswith("\x1b"):
            lines[row] += part
    return lines[:-1] if not lines[-1] else lines


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(canvas.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((40, 8)))
    return io.StringIO()


def test_canvases_fill_in_and_finished_texts_stay(drawn):
    show = Canvas(drawn).show
    for name in "ab":
        show(record(name, HOLE * 4))
    assert screen(drawn.getvalue()) == ["a  ░░░░", "b  ░░░░"]
    show(record("a", "w░░░"))
    show(record("b", "░░░z"))
    assert screen(drawn.getvalue()) == ["a  w░░░", "b  ░░░z"]
    show(record("b", "wxyz", finish_reason="length"))
    assert screen(drawn.getvalue()) == ["b  wxyz", "a  w░░░"]
    show(record("a", None, finish_reason="error", error="a is wrong"))
    assert screen(drawn.getvalue()) == ["b  wxyz", "a  a is wrong"]


def test_one_row_has_the_width_for_all_of_its_text(drawn):
    Canvas(drawn).show(record("a", "x" * 100))
    assert screen(drawn.getvalue()) == ["a", "x" * 39, "x" * 39, "x" * 22]


def test_more_rows_than_lines_are_counted(drawn):
    show = Canvas(drawn).show
    for number in range(20):
        show(record(f"r{number}", "x" * 100))
    lines = screen(drawn.getvalue())
    assert len(lines) == 6 and lines[-1] == "... 20 rows at work"
    assert all(len(line) < 40 for line in lines)
    for number in range(20):
        show(record(f"r{number}", "y", finish_reason="stop"))
    assert screen(drawn.getvalue()) == [f"r{number}  y" for number in range(20)]


def test_without_a_tokenizer_tokens_are_shown(drawn):
    Canvas(drawn).show(record("a", None))
    assert screen(drawn.getvalue()) == ["a", f"5 {HOLE}"]


def test_text_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\x9b\u202e\u2028c\nd") == "a [2Jb   c d"
    assert printable("a\nb", keep="\n") == "a\nb"


def test_wide_characters_take_two_columns():
    assert list(wrapped("日本語ab", 4)) == ["日本", "語ab"]
    assert list(wrapped("", 4)) == []
    assert list(wrapped("日本", 1)) == ["日", "本"]


def test_an_encoding_without_the_hole_gets_another():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    Canvas(stream).show(record("a", f"{HOLE}é"))
    assert b"_?" in raw.getvalue()


def on_terminal(command: list[str], term: str) -> str:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=os.environ | {"TERM": term})
    os.close(theirs)
    data = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        data += more
    os.close(ours)
    assert process.wait() == 0
    return data.decode().replace("\r\n", "\n")


def test_stream_on_a_terminal_and_elsewhere(tmp_path):
    requests = write_requests(tmp_path / "in.jsonl", 2)
    command = [*FAKE, "--input", str(requests), "--stream"]
    assert screen(on_terminal(command, "xterm")) == ["r1    1 tpmorp", "r0    0 tpmorp"]
    for plain in (on_terminal(command, "dumb"), subprocess.run(command, capture_output=True).stdout.decode()):
        assert plain.startswith('{"id": "r1", ') and len(plain.splitlines()) == 4 and "\x1b" not in plain
