"""The command: exit statuses, one-line errors, order and shape of results; with a stand-in for the library."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import FakeSession, write_requests

from bicache_jax.cli import COMMANDS, backend, build_parser, main
from bicache_jax.core.config import SamplingConfig
from bicache_jax.core.types import Request
from bicache_jax.serving.inputs import remaining

PYTHON = [sys.executable, "-m", "bicache_jax"]
FAKE = [sys.executable, str(Path(__file__).parents[1].joinpath("fake_run.py")), "generate"]


@pytest.fixture
def generate(monkeypatch, capfdbinary, tmp_path):
    """Runs `bicache generate` on the stand-in; gives (status, standard output, standard error)."""
    monkeypatch.setattr(backend, "open_session", FakeSession)
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, model: str = "fake"):
        status = main(["generate", "--model", model, *flags])
        out, err = capfdbinary.readouterr()
        return status, out.decode(), err.decode()

    return run


def read(text: str) -> list[dict]:
    return [json.loads(line) for line in text.split("\n")[:-1]]


def only_error(err: str) -> str:
    """The one line of standard error."""
    assert err.startswith("bicache: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


# Results


def test_results_are_in_input_order_and_complete(generate, tmp_path):
    write_requests(tmp_path / "in.jsonl", 4, n=2)
    status, out, err = generate("--input", "in.jsonl", "--output", "out.jsonl")
    assert status == 0 and out == ""
    results = read(Path("out.jsonl").read_text(encoding="utf-8"))
    expected = [(f"r{i}", sample) for i in range(4) for sample in range(2 + i % 2)]
    assert [(result["id"], result["sample"]) for result in results] == expected
    assert list(results[0]) == [
        "id", "sample", "token_ids", "text", "finish_reason", "prefix_len", "prefix_ratio", "boundary",
        "refresh_interval", "steps", "forward_passes",
    ]  # fmt: skip
    assert results[0]["text"] == "\u2028 0 tpmorp"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "out.jsonl.manifest.json"]
    assert err.count("\n") == 1


def test_standard_streams_give_the_same_bytes_as_files(generate, tmp_path, monkeypatch):
    requests = write_requests(tmp_path / "in.jsonl", 5)
    generate("--input", "in.jsonl", "--output", "out.jsonl")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(requests.read_bytes())))
    status, out, _ = generate("--input", "-", "--output", "-")
    assert status == 0
    assert out == Path("out.jsonl").read_text(encoding="utf-8")
    assert generate("--input", "in.jsonl")[1] == out  # standard output is the default


def test_bad_lines_have_errors_the_others_run_and_the_status_is_3(generate, tmp_path):
    lines = [b'{"id": "a", "prompt": "x"}', b"not json", b'{"id": "b"}', b"\xff\xfe", b'{"id": "a", "prompt": "y"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b'\n\n{"id": "c", "prompt": "z"}')
    status, out, err = generate("--input", "in.jsonl", "--output", "-")
    assert status == 3
    results = read(out)
    assert [result["finish_reason"] for result in results] == ["length"] + ["error"] * 4 + ["length"]
    assert [result.get("error", "")[:16] for result in results[1:5]] == [f"in.jsonl, line {i}" for i in (2, 3, 4, 5)]
    assert "4 errors" in err


def test_an_engine_error_ends_its_request_only(generate, tmp_path):
    write_requests(tmp_path / "in.jsonl", 3, n=3)
    status, _, _ = generate("--input", "in.jsonl", "--output", "out.jsonl", model="error=r1")
    assert status == 3
    results = read(Path("out.jsonl").read_text(encoding="utf-8"))
    assert [(r["id"], r["finish_reason"]) for r in results] == [("r0", "length")] * 3 + [("r1", "error")] + [
        ("r2", "length")
    ] * 3


def test_stream_writes_events_as_they_happen(generate, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "x"}\nbad\n{"id": "b", "prompt": "y"}\n')
    status, out, _ = generate("--input", "in.jsonl", "--output", "-", "--stream")
    assert status == 3
    events = [(event["id"], event["finish_reason"]) for event in read(out)]
    assert events == [("2", "error"), ("b", None), ("b", "length"), ("a", None), ("a", "length")]
    _, again, _ = generate("--input", "in.jsonl", "--output", "out.jsonl", "--stream")
    assert again == out
    assert [result["id"] for result in read(Path("out.jsonl").read_text())] == ["a", "2", "b"]


def test_empty_input_gives_empty_output(generate, tmp_path):
    (tmp_path / "in.jsonl").write_text("")
    assert generate("--input", "in.jsonl", "--output", "out.jsonl")[0] == 0
    assert Path("out.jsonl").read_bytes() == b""


def test_byte_order_mark_is_no_part_of_the_first_request(generate, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "a", "prompt": "x"}\r\n')
    assert read(generate("--input", "in.jsonl")[1])[0]["text"] == "x"


def test_dry_run_runs_nothing_and_needs_no_output(generate, tmp_path):
    write_requests(tmp_path / "in.jsonl", 3)
    status, out, err = generate("--input", "in.jsonl", "--dry-run", "--boundary", "7", model="log=made")
    assert (status, out, err) == (0, "3 requests, boundary 7\n", "")
    assert os.listdir(tmp_path) == ["in.jsonl"]


# What the user is told


def test_closing_line_has_accuracy_and_speed(generate, tmp_path):
    lines = [
        {"id": "a", "prompt": "x y", "answer": "y  x\n"},
        {"id": "b", "prompt": "12", "answer": ["other", 21]},
        {"id": "c", "prompt": "x", "answer": "other"},
        {"id": "d", "prompt": "x"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    err = generate("--input", "in.jsonl")[2]
    assert err == (
        "bicache: 4 results for 4 requests; accuracy 0.667 (2 of 3); 8 tokens in 2.0 s, 1.0 s of them compilation:"
        " 8 tokens/s without it; 7 forward passes, 3 prefix hits; boundary 3\n"
    )
    assert generate("--input", "in.jsonl", "--quiet")[2] == ""


def test_progress_bar_is_for_terminals_only(tmp_path):
    requests = write_requests(tmp_path / "in.jsonl", 3)
    command = [*FAKE, "--model", "wait=0.05", "--input", str(requests), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "\r" not in done.stderr
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    subprocess.run(command, stderr=theirs)
    os.close(theirs)
    assert b"result" in os.read(ours, 65536)
    os.close(ours)


# Faults: status 2 and one line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "x"], "argument --steps: must be an integer >= 1, got 'x' (see bicache generate --help)"),
        (["--steps", "0"], "argument --steps: must be an integer >= 1, got '0'"),
        (["--boundary", "-1"], "argument --boundary: must be 'auto' or an integer >= 0, got '-1'"),
        (["--boundary", "deep"], "argument --boundary: must be 'auto' or an integer >= 0, got 'deep'"),
        (["--policy", "fast"], "argument --policy: invalid choice: 'fast'"),
        (["--seed", str(2**63)], "argument --seed: must be an integer from 0 to"),
        (["--step", "4"], "unrecognized arguments: --step 4"),
        (["--policy", "none", "--boundary", "3"], "policy 'none' keeps no prefix cache, so it takes no boundary"),
        (["--policy", "none", "--boundary-table", "t"], "--policy none keeps no prefix cache"),
        (["--policy", "naive", "--boundary", "3"], "--policy naive has its boundary at the last layer"),
        (["--boundary", "3", "--boundary-table", "t"], "--boundary 3 leaves --boundary-table without use"),
        (["--temperature", "-1"], "--temperature must be finite and >= 0, got -1.0"),
        (["--temperature", "nan"], "--temperature must be finite and >= 0, got nan"),
        (["--input", "nowhere.jsonl"], "cannot read --input nowhere.jsonl: No such file or directory"),
        (["--input", "."], "cannot read --input .: Is a directory"),
        (["--output", "nowhere/out.jsonl"], "--output nowhere/out.jsonl: there is no folder nowhere"),
        (["--output", "."], "--output . is a folder"),
        (["--output", "a" * 300], "File name too long"),
        (["--output", "in.jsonl"], "--output in.jsonl is the --input"),
        (["--resume", "--output", "-"], "--resume reads the journal beside an output file"),
        (["--compilation-cache", "c", "--no-compilation-cache"], "not allowed with argument"),
        (["--model", "missing"], "missing: no such folder; name a checkpoint folder"),
    ],
)
def test_faults_are_one_line_that_names_the_flag(generate, tmp_path, flags, message):
    write_requests(tmp_path / "in.jsonl", 2)
    status, out, err = generate("--input", "in.jsonl", "--output", "out.jsonl", *flags)
    assert (status, out) == (2, "")
    assert message in only_error(err)
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("argv", [[], ["nothing"], ["generate"], ["--nothing"]])
def test_incomplete_commands_are_one_line_too(argv, capsys):
    assert main(argv) == 2
    only_error(capsys.readouterr().err)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads and writes everything")
def test_permissions_are_one_line(generate, tmp_path):
    write_requests(tmp_path / "in.jsonl", 2)
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "cannot write" in only_error(generate("--input", "in.jsonl", "--output", "closed/out.jsonl")[2])
    (tmp_path / "in.jsonl").chmod(0)
    assert "Permission denied" in only_error(generate("--input", "in.jsonl")[2])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
@pytest.mark.parametrize("flags", [["--output", "/dev/full"], ["--output", "-"], ["--stream"]])
def test_a_full_device_is_one_line(tmp_path, flags):
    write_requests(tmp_path / "in.jsonl", 2)
    command = [*FAKE, "--model", "fake", "--input", str(tmp_path / "in.jsonl"), *flags]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left on device" in only_error(done.stderr)


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no such name")
def test_standard_output_by_another_name_is_not_replaced(generate, tmp_path):
    write_requests(tmp_path / "in.jsonl", 2)
    generate("--input", "in.jsonl", "--output", "out.jsonl")
    command = [*FAKE, "--model", "fake", "--input", "in.jsonl", "--output", "/dev/stdout"]
    (tmp_path / "all.jsonl").write_bytes(b"before\n")
    with open(tmp_path / "all.jsonl", "ab") as output:
        assert subprocess.run(command, stdout=output, stderr=subprocess.PIPE, cwd=tmp_path).returncode == 0
    assert (tmp_path / "all.jsonl").read_bytes() == b"before\n" + (tmp_path / "out.jsonl").read_bytes()


def test_results_have_a_line_each_for_every_reader_of_lines(generate, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a\u2028b\x85c\u2029d", "prompt": "x"}) + "\n")
    out = generate("--input", "in.jsonl")[1]
    assert len(out.splitlines()) == 1 and json.loads(out)["id"] == "a\u2028b\x85c\u2029d"


# Interruptions


def test_interrupt_before_the_first_result_leaves_nothing(generate, tmp_path):
    write_requests(tmp_path / "in.jsonl", 2)
    status, _, err = generate("--input", "in.jsonl", "--output", "out.jsonl", model="interrupt=r1")
    assert status == 130
    assert err == "bicache: interrupted; no result was finished\n"
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("flags", [[], ["--stream"], ["--dry-run"]])
def test_a_closed_pipe_is_quiet(tmp_path, flags):
    requests = write_requests(tmp_path / "in.jsonl", 200)
    command = [*FAKE, "--model", "wait=0.001", "--input", str(requests), "--output", "-", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (141, b"")


def test_a_device_is_written_not_replaced(generate, tmp_path):
    write_requests(tmp_path / "in.jsonl", 2)
    assert generate("--input", "in.jsonl", "--output", os.devnull)[0] == 0
    assert not os.path.isfile(os.devnull) and not os.path.exists(f"{os.devnull}.journal")


# What is left to run after a cut


def test_remaining_keeps_seeds_and_covers_every_gap():
    requests = [Request(f"r{i}", (1, 2), n=n, sampling=SamplingConfig(seed=10)) for i, n in enumerate([1, 1, 7])]
    finished = dict.fromkeys([("r0", 0), ("r2", 1), ("r2", 4)])
    ran = []
    while todo := remaining(requests, finished):
        assert len({request.id for request, _ in todo}) == len(todo)  # else the engine's samples are ambiguous
        new = [(request.id, first + i) for request, first in todo for i in range(request.n)]
        assert all(request.sampling.seed == 10 + first for request, first in todo)
        ran += new
        finished |= dict.fromkeys(new)
    assert sorted(ran) == [("r1", 0)] + [("r2", sample) for sample in (0, 2, 3, 5, 6)]


# Help


def test_help_is_complete_grouped_and_has_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    groups = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups[:4] == ["options", "input and output", "model", "cache"]
    assert groups[4:] == ["length and seed", "order", "tokens", "running", "answers", "presets", "examples"]
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    for action in commands["generate"]._actions:
        if action.required or action.const is not None or action.dest == "help":
            continue
        assert action.help is not None
        assert "(default: " in action.help, f"{action.dest} does not say its default"
        if action.default is not None:
            assert action.help % {"default": action.default} in " ".join(text.split())
            assert f"(default: {action.default})" in " ".join(text.split())


def test_help_starts_without_jax():
    code = f"import sys; sys.argv = ['bicache', '--help']; import bicache_jax.cli\ntry: {main.__module__}.main()\n"
    code += "except SystemExit: pass\nprint(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for name in COMMANDS:
        assert name in done.stdout


def test_module_and_command_are_the_same():
    done = subprocess.run([*PYTHON, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("bicache ")
    assert subprocess.run([*PYTHON, "generate"], capture_output=True).returncode == 2
