"""`bicache generate` on a real engine and a tiny checkpoint with random weights."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint_files
import pytest
from golden import FOLDERS

from bicache_jax import CacheConfig, Engine, SamplingConfig, load_model
from bicache_jax.bulk.journal import journal_path
from bicache_jax.cli import main

FOLDER = FOLDERS["llada"]
PREFIX = list(range(10, 42))
FLAGS = ["--model", str(FOLDER), "--boundary", "2", "--refresh-interval", "4", "--gen-length", "8", "--steps", "8"]
FLAGS += ["--temperature", "0.7", "--seed", "3", "--batch-size", "2", "--quiet"]
HERE = ["--no-compilation-cache"]  # it would change jax's configuration for the rest of the test process


def request_lines() -> list[dict]:
    """Six requests over a shared prefix, and one that asks for five samples."""
    shared = [{"id": f"q{i}", "prompt_ids": [*PREFIX, 50 + i, 60 + i]} for i in range(6)]
    return [*shared[:3], {"id": "several", "prompt_ids": [*PREFIX[5:25], 7], "n": 5}, *shared[3:]]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """(requests, results of an undisturbed run)."""
    folder = tmp_path_factory.mktemp("whole")
    requests = write(folder / "in.jsonl", request_lines())
    assert main(["generate", *FLAGS, *HERE, "--input", str(requests), "--output", str(folder / "out.jsonl")]) == 0
    return requests, folder / "out.jsonl"


def test_command_and_library_give_the_same_results(whole):
    engine = Engine(
        load_model(FOLDER),
        cache=CacheConfig(boundary=2, refresh_interval=4),
        sampling=SamplingConfig(gen_length=8, steps=8, temperature=0.7, seed=3),
    )
    assert read(whole[1]) == [result.to_json() for result in engine.generate(request_lines())]
    assert {result["prefix_len"] for result in read(whole[1])} == {21, 32}


def test_stream_ends_in_the_same_results(whole, capfdbinary):
    every = ["--stream", "--stream-every", "4"]
    assert main(["generate", *FLAGS, *HERE, "--input", str(whole[0]), "--output", "-", *every]) == 0
    events = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    final = {(event["id"], event["sample"]): event for event in events if event["finish_reason"] is not None}
    assert list(map(final.get, ((r["id"], r["sample"]) for r in read(whole[1])))) == read(whole[1])
    partial = [event for event in events if event["finish_reason"] is None]
    assert len(partial) == len(final)  # of 8 steps
    mask = json.loads((FOLDER / "config.json").read_text())["mask_token_id"]
    assert all(event["token_ids"].count(mask) == 4 for event in partial)


def test_dry_run_shows_the_plan(whole, capsys):
    assert main(["generate", *FLAGS, *HERE, "--input", str(whole[0]), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "11 rows over 2 prefixes" in plan and "expected gain" in plan and "MiB" in plan
    assert main(["plan", *FLAGS, *HERE, "--input", str(whole[0])]) == 0
    assert capsys.readouterr().out == plan


def test_plan_as_json_has_what_the_run_does(whole, capsys):
    assert main(["plan", *FLAGS, *HERE, "--input", str(whole[0]), "--json"]) == 0
    plan, results = json.loads(capsys.readouterr().out), read(whole[1])
    assert (plan["rows"], plan["prefixes"]) == (len(results), 2)
    assert sum(batch["rows"] for batch in plan["batches"]) == len(results)
    assert {batch["boundary"] for batch in plan["batches"]} == {result["boundary"] for result in results}
    assert {batch["steps"] for batch in plan["batches"]} == {result["steps"] for result in results}
    assert plan["memory"]["total"] == sum(size for name, size in plan["memory"].items() if name != "total")
    assert max(batch["cache"] for batch in plan["batches"]) < plan["memory"]["total"]
    assert plan["device_memory"] is None  # CPUs do not say
    assert plan["gain"] > 1


def test_plan_takes_the_flags_of_generate_and_a_preset(whole, capsys):
    flags = ["--model", str(FOLDER), *HERE, "--input", str(whole[0]), "--policy", "none", "--json"]
    assert main(["plan", *flags, "--preset", "fast_dllm_llada", "--gen-length", "64", "--block-cache", "prefix"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["policy"], plan["block_cache"], plan["prefixes"]) == ("none", "prefix", 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["--boundary", "99"], "99 is deeper than the model's 6 layers"),
        (["--boundary", "auto"], "bicache profile"),
        (["--boundary", "auto", "--boundary-table", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--mask-id", "100000"], "mask_id must be a token of the vocabulary"),
    ],
)
def test_faults_of_model_and_table_are_one_line(whole, tmp_path, capsys, flags, message):
    output = tmp_path / "out.jsonl"
    assert main(["generate", *FLAGS, *HERE, "--input", str(whole[0]), "--output", str(output), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("bicache: error: ") and err.count("\n") == 1
    assert message in err
    assert not output.exists() and not journal_path(output).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gen-length", "10", "--block-length", "4"], "--gen-length must be a multiple of --block-length, got 10"),
        (["--block-length", "4", "--steps", "3"], "--steps must be a multiple of the number of blocks, got 3 steps"),
        (["--policy", "exact", "--boundary", "auto"], "--policy 'exact' is for block-causal attention"),
    ],
)
def test_lengths_that_the_model_does_not_have_are_one_line(whole, capsys, flags, message):
    """Which go together is the model's to say, so it is read first."""
    files = ["--input", str(whole[0]), "--output", str(whole[0].parent / "other.jsonl")]
    assert main(["generate", *FLAGS, *HERE, *files, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bicache: error: {message}") and error.count("\n") == 1


def test_compilation_cache_that_cannot_be_written_is_one_line(whole, capfd):
    folder = str(FOLDER / "config.json" / "cache")
    assert main(["generate", *FLAGS, "--input", str(whole[0]), "--compilation-cache", folder]) == 2
    assert capfd.readouterr().err == f"bicache: error: cannot write --compilation-cache {folder}: Not a directory\n"


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bytes(whole, tmp_path, capsys):
    """Kills a real run, then resumes from what any moment of it may have left."""
    requests, expected = whole
    output = tmp_path / "out.jsonl"
    journal, cache = journal_path(output), str(tmp_path / "cache")
    command = ["generate", *FLAGS, "--input", str(requests), "--output", str(output)]
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["XDG_CACHE_HOME"] = cache
    process = subprocess.Popen([sys.executable, "-m", "bicache_jax", *command], env=env)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not output.exists()
    assert os.listdir(f"{cache}/bicache-jax/xla")
    kept = journal.read_bytes()
    assert main([*command, *HERE, "--resume"]) == 0
    assert output.read_bytes() == expected.read_bytes()

    header, lines = kept.split(b"\n")[0] + b"\n", expected.read_bytes().splitlines(keepends=True)
    chance = random.Random(0)
    # The last request alone: its prefix is the one that it shares with requests that need not run again.
    for left in [{len(lines) - 1}, {3, 5, 6}, *(set(chance.sample(range(len(lines)), 4)) for _ in range(3))]:
        journal.write_bytes(
            header + b"".join(line for i, line in enumerate(lines) if i not in left) + b'{"id": "q1", "s'
        )
        assert main([*[flag for flag in command if flag != "--quiet"], *HERE, "--resume"]) == 0
        assert output.read_bytes() == expected.read_bytes()
        assert f"{len(lines) - len(left)} from the journal); {len(left) * 8} tokens" in capsys.readouterr().err

    journal.write_bytes(kept)
    assert main([*command, *HERE, "--resume", "--boundary", "3"]) == 2
    assert "boundary was 2 and is 3 now" in capsys.readouterr().err
    assert journal.read_bytes() == kept


def odd_line(chance: random.Random, number: int) -> bytes:
    """A line of a request file as users, programs and disks may write it; one in four is in order."""
    prompt = [chance.randrange(100) for _ in range(chance.randrange(1, 30))]
    record: dict[str, Any] = {"id": f"line {number}", "prompt_ids": prompt, "gen_length": 8}
    values = [None, True, -1, 0, 1, 1.5, 2**70, "x", "", [], [1], {}, float("nan"), [[1]], "\u2028", "\ud800", prompt]
    match chance.randrange(8):
        case 0 | 1:
            pass
        case 2:
            return bytes(chance.randrange(256) for _ in range(chance.randrange(1, 40))).replace(b"\n", b"")
        case 3:
            return json.dumps(record).encode()[: chance.randrange(1, 60)]
        case 4:
            record[chance.choice(["prompt_ids", "id", "messages", "prompt", "steps", "n"])] = chance.choice(values[:-1])
        case 5:
            record[chance.choice(["gen_length", "seed", "prefix_len", "block_length"])] = chance.choice(values)
        case 6:
            del record[chance.choice(list(record)[:2])]
        case 7:
            record["prompt_ids"] = [chance.choice([100, 101, -1, 2**40, 5]) for _ in range(chance.randrange(300))]
    return json.dumps(record).encode() + chance.choice([b"", b"\r", b"  ", b"\x00"])


@pytest.mark.full
def test_a_thousand_lines_have_a_result_each(tmp_path, capfd):
    folder = checkpoint_files.llada(tmp_path / "model", n_layers=2)
    chance = random.Random(5)
    lines = [odd_line(chance, number) for number in range(1000)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    flags = ["--model", str(folder), "--policy", "none", "--batch-size", "4", *HERE]  # few shapes to compile
    output = tmp_path / "out.jsonl"
    assert main(["generate", *flags, "--input", str(tmp_path / "in.jsonl"), "--output", str(output)]) == 3
    results = read(output)
    named = [line.strip() for line in lines if line.strip()]
    assert len({result["id"] for result in results}) >= 0.95 * len(named)
    done = [result for result in results if result["finish_reason"] != "error"]
    assert len(done) > 250 and all(len(result["token_ids"]) > 0 for result in done)
    wrong = [result for result in results if result["finish_reason"] == "error"]
    assert len(wrong) > 400 and all(f"{tmp_path}/in.jsonl, line " in result["error"] for result in wrong)
    samples = sum(result["sample"] > 0 for result in results)
    assert len(results) - samples == len(named)
    assert capfd.readouterr().err.count("\n") == 1


def test_table_of_another_model_is_refused_or_warned_of(whole, tmp_path, capfd):
    table = {"model": "other", "fingerprint": "1234", "num_layers": 6, "table": {"0": 2}}
    path = write(tmp_path / "table.json", [table])
    flags = ["--boundary", "auto", "--boundary-table", str(path), "--dry-run"]
    assert main(["generate", *FLAGS, *HERE, "--input", str(whole[0]), *flags]) == 0
    assert capfd.readouterr().err == (
        f"bicache: warning: --boundary-table {path} was made for another checkpoint (other)\n"
    )
    write(path, [table | {"num_layers": 32}])
    assert main(["generate", *FLAGS, *HERE, "--input", str(whole[0]), *flags]) == 2
    assert "is for a model of 32 layers" in capfd.readouterr().err


def again(requests: Path, output: Path, *flags: str) -> int:
    return main(["generate", *FLAGS, *HERE, "--input", str(requests), "--output", str(output), *flags])


def test_a_finished_output_is_resumed_by_its_own_run_only(tmp_path, capsys):
    requests, output = write(tmp_path / "in.jsonl", request_lines()[:2]), tmp_path / "out.jsonl"
    assert again(requests, output) == 0
    done = output.read_bytes()
    manifest = json.loads(Path(f"{output}.manifest.json").read_text())["outputs"]["out.jsonl"]
    assert (manifest["requests"], manifest["results"], manifest["errors"]) == (2, 2, 0)
    assert again(requests, output, "--resume") == 0 and output.read_bytes() == done
    capsys.readouterr()
    for change, named in ((["--seed", "4"], "seed was 3 and is 4 now"), (["--boundary", "3"], "boundary was 2")):
        assert again(requests, output, "--resume", *change) == 2
        assert named in capsys.readouterr().err
    write(requests, request_lines()[1:3])
    assert again(requests, output, "--resume") == 2 and "input was" in capsys.readouterr().err
    assert output.read_bytes() == done
    assert again(requests, output, "--overwrite") == 0 and output.read_bytes() != done
    output.write_bytes(done)
    assert again(requests, output, "--resume") == 2 and "was changed since it was written" in capsys.readouterr().err
    Path(f"{output}.manifest.json").unlink()
    assert again(requests, output, "--resume") == 2 and "--overwrite starts over" in capsys.readouterr().err


def test_a_finished_output_with_errors_says_so_again(tmp_path):
    requests, output = write(tmp_path / "in.jsonl", [*request_lines()[:1], {"prompt_ids": []}]), tmp_path / "out.jsonl"
    assert again(requests, output) == 3
    assert again(requests, output, "--resume") == 3


def test_compressed_requests_are_read(tmp_path, whole, capsys):
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(whole[0].read_bytes()))
    assert again(packed, tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole[1].read_bytes()
    packed.write_bytes(packed.read_bytes()[:-20])
    assert again(packed, tmp_path / "torn.jsonl") == 2 and "not a whole gzip file" in capsys.readouterr().err
