"""Launch files: what they start exists, and they do the right thing when it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from golden import FOLDERS

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
SHELL = [LAUNCH / "tpu_vm.sh", LAUNCH / "slurm.sbatch"]

sys.path.insert(0, str(ROOT / "scripts"))
import batch_inference  # noqa: E402


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (extra `lint`)")
def test_shell_is_clean(file):
    done = subprocess.run(["shellcheck", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_jobset_is_clean_and_starts_what_there_is():
    yaml = pytest.importorskip("yaml")
    file = LAUNCH / "gke_jobset.yaml"
    if shutil.which("yamllint"):
        rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable}}"
        done = subprocess.run(["yamllint", "--strict", "-d", rules, file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    jobset = yaml.safe_load(file.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "/app/scripts/batch_inference.py"]
    args = batch_inference.build_parser().parse_args(container["args"])
    assert args.distributed and args.resume and (args.stopped_status, args.errors_status) == (143, 0)
    # Chips of the slice: those of its topology, and those of its hosts.
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert x * y == job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"] and args.mesh == "data=4"


def stub(folder: Path, name: str, body: str) -> None:
    """A program that writes down its arguments."""
    file = folder / name
    file.write_text(
        f'#!/usr/bin/env bash\nprintf "%q " {name} "$@" >> "{folder}/calls"; echo >> "{folder}/calls"\n{body}\n'
    )
    file.chmod(0o755)


def launch(file: Path, folder: Path, *flags: str, **env: str) -> tuple[int, list[list[str]]]:
    """Runs a launch file among stubs; returns its exit status and the calls of stubs."""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", file, *flags], env={**os.environ, "PATH": path, **env}, cwd=ROOT, capture_output=True
    )
    calls = folder / "calls"
    return done.returncode, [shlex.split(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def parsed(command: list[str]) -> object:
    """The flags of the script in a command."""
    place = next(place for place, word in enumerate(command) if word.endswith("scripts/batch_inference.py"))
    return batch_inference.build_parser().parse_args(command[place + 1 :])


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (143, True), (137, True)])
def test_slurm_requeues_what_is_not_done(tmp_path, status, requeued):
    stub(tmp_path, "srun", f"exit {status}")
    stub(tmp_path, "scontrol", "")
    flags = ["--model", "m", "--input", "a b.jsonl", "--output", "o"]
    ended, calls = launch(LAUNCH / "slurm.sbatch", tmp_path, *flags, SLURM_JOB_ID="7")
    assert ended == status
    assert ["scontrol", "requeue", "7"] in calls if requeued else len(calls) == 1
    args = parsed(calls[0])
    assert args.input == ["a b.jsonl"] and args.distributed and args.resume and args.shard == (0, 1)


def test_slurm_arrays_are_slices(tmp_path):
    stub(tmp_path, "srun", "")
    flags = ["--model", "m", "--input", "i", "--output", "o"]
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8"}
    ended, calls = launch(LAUNCH / "slurm.sbatch", tmp_path, *flags, **array)
    assert ended == 0 and parsed(calls[0]).shard == (2, 8)


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a clone")
def test_tpu_vm_copies_installs_and_starts_on_all_hosts(tmp_path):
    stub(tmp_path, "gcloud", "")
    flags = ["slice", "us-west4-a", "data=8", "--model", "m", "--input", "gs://b/in/*.jsonl", "--output", "gs://b/out"]
    ended, calls = launch(LAUNCH / "tpu_vm.sh", tmp_path, *flags)
    assert ended == 0
    assert [call[4] for call in calls] == ["scp", "ssh", "ssh"] and all("--worker=all" in call for call in calls)
    args = parsed(shlex.split(calls[2][calls[2].index("--command") + 1]))
    assert args.input == ["gs://b/in/*.jsonl"] and args.mesh == "data=8" and args.distributed and args.resume
    extras = re.search(r"bicache-jax\[([\w,]+)\]", calls[1][-1])
    assert extras and set(extras[1].split(",")) <= set(
        re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    )
    install = calls[1][calls[1].index("--command") + 1].removeprefix("$").replace("\\n", "\n")  # as bash quotes it
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    for name, ends in (("python3", 1), ("python3.11", 0)):  # that which is asked first is too old
        script = f'#!/bin/sh\nif [ "$1" = -c ]; then exit {ends}; fi\nmkdir -p venv/bin; echo {name} "$@" > used\n'
        (tmp_path / name).write_text(script + "printf '#!/bin/sh\\n' > venv/bin/pip; chmod +x venv/bin/pip\n")
        (tmp_path / name).chmod(0o755)
        (tmp_path / "python3.11").exists() or shutil.copy(tmp_path / "python3", tmp_path / "python3.11")
        (tmp_path / "tar").write_text("#!/bin/sh\n")
        (tmp_path / "tar").chmod(0o755)
        paths = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        script = install.replace("python3.13 python3.12 ", "")  # which this machine may have
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=paths, capture_output=True, text=True)
        if ends:
            assert done.returncode == 2 and "no Python 3.11 or newer" in done.stderr
        else:
            assert done.returncode == 0 and (tmp_path / "used").read_text() == "python3.11 -m venv venv\n", done.stderr
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    ended, calls = launch(LAUNCH / "tpu_vm.sh", tmp_path, "slice")
    assert ended == 2 and not calls


def test_ray_actors_answer_as_generate_does():
    sys.path.insert(0, str(LAUNCH))
    from ray_data import FIELDS, Answer

    from bicache_jax import CacheConfig, Engine, SamplingConfig, load_model

    folder = str(FOLDERS["llada"])
    requests = [{"id": f"q{i}", "prompt_ids": [*range(10, 30), 40 + i]} for i in range(3)]
    sampling, cache = {"gen_length": 4, "steps": 2}, {"boundary": 2}
    block = Answer(folder, sampling, cache)({"text": [*map(json.dumps, requests), "not json"]})
    engine = Engine(load_model(folder), cache=CacheConfig(**cache), sampling=SamplingConfig(**sampling))
    expected = [result.to_json() for result in engine.generate(requests)]
    rows = [{field: block[field][i] for field in FIELDS} for i in range(4)]
    assert rows[3]["error"] is not None and rows[3]["finish_reason"] == "error"
    assert rows[:3] == [{**result, "error": None} for result in expected]
