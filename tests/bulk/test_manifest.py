"""Finished outputs and the manifests beside them: what may go on, what is refused by name, and kills in between."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_run import FakeSession, write_requests

from bicache_jax.bulk import manifest, state
from bicache_jax.cli import backend, main, outputs


class Killed(BaseException):
    """Nothing catches it, so what follows a kill does not happen; what is tidied up on the way out does."""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(backend, "open_session", FakeSession)
    monkeypatch.chdir(tmp_path)
    write_requests(tmp_path / "a.jsonl", 5)
    (tmp_path / "b.jsonl").write_text('{"id": "x", "prompt": "one"}\nnot json\n')
    return tmp_path


def command(name: str, model: str = "log=made") -> list[str]:
    """A run of two inputs (`batch`), or of the one that has a bad line (`generate`)."""
    if name == "batch":
        return ["batch", "--model", model, "--input", "a.jsonl", "b.jsonl", "--output", "out", "--quiet"]
    return ["generate", "--model", model, "--input", "b.jsonl", "--output", "out.jsonl", "--quiet"]


def made() -> int:
    """Results that were computed so far."""
    return len(Path("made").read_text().split()) if Path("made").exists() else 0


def finished(name: str) -> list[Path]:
    return [Path("out/a.jsonl"), Path("out/b.jsonl")] if name == "batch" else [Path("out.jsonl")]


def manifest_of(name: str) -> Path:
    return Path("out/_manifest.json" if name == "batch" else "out.jsonl.manifest.json")


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("bicache: error: ") and err.count("\n") == 1, err
    return err


NAMES = pytest.mark.parametrize("name", ["batch", "generate"])


@NAMES
def test_resume_of_a_finished_run_computes_nothing_and_exits_3_where_results_are_errors(name):
    assert main(command(name)) == 3
    before, count = [path.read_bytes() for path in finished(name)], made()
    assert main([*command(name), "--resume"]) == 3
    assert made() == count and [path.read_bytes() for path in finished(name)] == before
    entries = json.loads(manifest_of(name).read_text())["outputs"]
    assert entries[finished(name)[-1].name]["errors"] == 1 and entries[finished(name)[-1].name]["requests"] == 2
    assert {"bicache-jax", "jax"} <= entries[finished(name)[-1].name]["versions"].keys()
    if name == "batch":
        assert main([*command(name), "--resume", "--errors-status", "7"]) == 7


@NAMES
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: ["--seed", "5"], "seed was 0 and is 5 now"),
        (lambda: [str(Path("b.jsonl").write_text('{"id": "x", "prompt": "two"}\nnot json\n') and "--resume")], "input"),
        (lambda: [str(Path("b.jsonl").write_text('{"id": "x", "prompt": "one"}\n') and "--resume")], "input"),
    ],
    ids=["flags", "edited", "shortened"],
)
def test_resume_refuses_what_differs_by_name_and_overwrite_begins_again(name, change, words, capsys):
    assert main(command(name)) == 3
    before, count = [path.read_bytes() for path in finished(name)], made()
    capsys.readouterr()
    flags = change()
    assert main([*command(name), *flags, "--resume"]) == 2
    said = only_line(capsys)
    assert words in said and "--overwrite starts over" in said
    assert made() == count and [path.read_bytes() for path in finished(name)] == before
    flags = [flag for flag in flags if flag != "--resume"]
    assert main([*command(name), *flags, "--overwrite"]) in (0, 3)
    assert made() > count
    assert main([*command(name), *flags, "--resume"]) in (0, 3)


@NAMES
def test_resume_refuses_an_output_that_was_changed_or_that_nothing_tells_of(name, capsys):
    main(command(name))
    output, kept = finished(name)[-1], finished(name)[-1].read_bytes()
    output.write_bytes(kept.replace(b'"x"', b'"y"'))
    capsys.readouterr()
    assert main([*command(name), "--resume"]) == 2
    assert f"{output} was changed since it was written" in only_line(capsys)
    output.write_bytes(kept)
    assert main([*command(name), "--resume"]) == 3
    whole = manifest_of(name).read_bytes()
    for damaged in (b"", whole[:-20], b"[]", b'{"format": 1, "outputs": {"b.jsonl": {}, "out.jsonl": {}}}'):
        manifest_of(name).write_bytes(damaged)
        assert main([*command(name), "--resume"]) == 2
        assert "is damaged: --overwrite starts over" in only_line(capsys)
    manifest_of(name).unlink()
    assert main([*command(name), "--resume"]) == 2
    assert "does not say what it was made from: --overwrite" in only_line(capsys)
    assert main([*command(name), "--overwrite"]) == 3
    assert main([*command(name), "--resume"]) == 3


def test_overwrite_drops_what_a_run_with_other_flags_left(capsys):
    for name in ("batch", "generate"):
        interrupted = command(name, "interrupt=x" if name == "generate" else "interrupt=r1")
        Path("b.jsonl").write_text('{"id": "x", "prompt": "one"}\n{"id": "last", "prompt": "two"}\n')
        assert main(interrupted) == 130
        capsys.readouterr()
        assert main([*command(name), "--seed", "5"]) == 2
        assert "--overwrite" in only_line(capsys)
        assert main([*command(name), "--seed", "5", "--resume"]) == 2
        assert "seed was 0 and is 5 now" in only_line(capsys)
        assert main([*command(name), "--seed", "5", "--overwrite"]) == 0
        lines = [json.loads(line) for path in finished(name) for line in path.read_bytes().splitlines()]
        assert all(line["steps"] == 5 for line in lines)  # the stand-in says the seed there
        assert main([*command(name), "--seed", "5", "--resume"]) == 0


def test_overwrite_of_one_slice_leaves_the_others(capsys):
    for part in ("0/2", "1/2"):
        assert main([*command("batch"), "--shard", part]) in (0, 3)
    kept = {path: path.read_bytes() for path in Path("out").iterdir() if "00001-of" in path.name}
    assert len(kept) == 3
    assert main([*command("batch"), "--shard", "0/2", "--seed", "5", "--overwrite"]) == 3
    assert {path: path.read_bytes() for path in kept} == kept
    assert main([*command("batch"), "--shard", "1/2", "--resume"]) == 0
    assert main([*command("batch"), "--shard", "1/2", "--seed", "5", "--resume"]) == 2


def test_an_input_that_is_added_to_a_finished_folder_is_answered_alone():
    assert main(command("batch")) == 3
    count = made()
    write_requests(Path("c.jsonl"), 4)
    more = command("batch")
    more.insert(more.index("b.jsonl") + 1, "c.jsonl")
    assert main([*more, "--resume"]) == 3
    assert made() == count + 4
    assert sorted(json.loads(manifest_of("batch").read_text())["outputs"]) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert main([*more, "--resume"]) == 3 and made() == count + 4


@pytest.mark.slow
@NAMES
@pytest.mark.parametrize("errors_only", [False, True])
def test_a_kill_at_any_write_of_the_end_resumes_to_the_same_bytes(name, errors_only, monkeypatch):
    """Dies before or after each file that is written or removed while the output is put together, and goes on."""
    if errors_only:  # no journal has a result then
        Path("a.jsonl").write_text("bad\n")
        Path("b.jsonl").write_text("bad\n")
    run = command(name)
    assert main(run) == 3
    expected = {path: path.read_bytes() for path in [*finished(name), manifest_of(name)]}
    places = [
        *((module, "write_manifest") for module in (state, outputs)),
        *((module, "write_whole") for module in (state, manifest)),
        *((module, "remove") for module in (state, outputs)),
        *((outputs, "write_atomic"), (state, "remove_folder"), (outputs.Journal, "remove")),
    ]
    kills = 0
    for at in range(1, 100):
        for path in (*Path("out").rglob("*.json*"), *Path().glob("out.jsonl*")):
            path.unlink()
        calls = 0

        def dying(original: Callable[..., Any], at: int = at) -> Callable[..., Any]:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal calls
                calls += 1
                place = 2 * calls
                if at == place - 1:
                    raise Killed
                found = original(*args, **more)
                if at == place:
                    raise Killed
                return found

            return call

        with monkeypatch.context() as patch:
            for home, function in places:
                patch.setattr(home, function, dying(getattr(home, function)))
            # A killed process closes nothing, so that a journal without results stays where it is.
            patch.setattr(outputs.FileOutput, "close", lambda self: self._journal._file.close())
            try:
                main([*run, "--resume"])
                break
            except Killed:
                kills += 1
        assert main([*run, "--resume"]) == 3, at
        assert {path: path.read_bytes() for path in expected} == expected, at
        assert not Path("out/_state").exists() and not Path("out.jsonl.journal").exists()
    assert kills >= 6


@NAMES
def test_lines_of_openai_are_those_of_the_run_that_computed_them(name, monkeypatch, capsys):
    """They hold the time of the answer and the name of the model: a restart, or another worker, writes the same."""
    run = [*command(name), "--output-format", "openai"]
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_manifest", lambda *_: (_ for _ in ()).throw(Killed))
        patch.setattr(state.State, "_complete_manifest", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            main(run)
    before, count = [path.read_bytes() for path in finished(name)], made()
    times = [json.loads(line)["response"]["body"].get("created") for lines in before for line in lines.splitlines()]
    assert count and len({time for time in times if time}) == count
    capsys.readouterr()
    assert main([*run, "--resume", "--model", "log=made,other"]) == 2
    assert 'model_name was "log=made" and is "log=made,other" now' in only_line(capsys)
    assert main([*run, "--resume"]) == 3
    assert [path.read_bytes() for path in finished(name)] == before and made() == count
    assert main([*run, "--resume"]) == 3 and made() == count


def test_a_worker_waits_until_the_manifest_is_written(tmp_path):
    """Process 0 must outlive who puts the outputs together: its end would end them."""
    first, second = (state.State("out", [tmp_path / "a.jsonl"], state.Worker(n, 2), resume=True) for n in (0, 1))
    for number, worker in enumerate((first, second)):
        worker.begin({"model": "x"})
        with worker.window("a.jsonl", 0, {"model": "x"}, 2) as journal:
            journal.add({"id": f"r{number}", "sample": 0, "finish_reason": "stop"}, index=number, of=1)
    read = {"a.jsonl": ("digest", 2)}
    assert first.finish({"a.jsonl": [0]}, read) == []
    seen = []
    complete = second._complete_manifest
    second._complete_manifest = lambda: (seen.append((first.is_over(), first.is_settled())), complete())
    assert second.finish({"a.jsonl": [0]}, read) == [Path("out/a.jsonl")]
    assert seen == [(True, False)] and first.is_settled()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@NAMES
def test_modes_of_files_are_those_that_the_user_asks_for(name, mask):
    before = os.umask(mask)
    try:
        interrupted = command(name, "interrupt=x")
        Path("b.jsonl").write_text('{"id": "x", "prompt": "one"}\n{"id": "last", "prompt": "two"}\n')
        assert main(interrupted) == 130  # leaves journals
        kept = [path for path in (*Path("out").rglob("*"), *Path().glob("out.jsonl*")) if path.is_file()]
        assert kept
        assert main([*command(name), "--resume"]) == 0
        kept += [*finished(name), manifest_of(name)]
        modes = {stat.S_IMODE(path.stat().st_mode) for path in kept if path.exists()}
    finally:
        os.umask(before)
    assert modes == {0o666 & ~mask}
