"""The real lm-evaluation-harness on tasks that need no network, over the bundled model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install 'bicache-jax[lm-eval]'")

from bicache_jax import Engine, load_model  # noqa: E402
from bicache_jax.cli import lm_eval as command  # noqa: E402
from bicache_jax.cli import main  # noqa: E402

# Its libraries warn of one another, and warnings are errors here.
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("default")]
ROOT = Path(__file__).parents[2]
FLAGS = ["--include-path", "examples/lm_eval", "--quiet", "--json", "--method", "pseudo"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)  # where the tasks find their data
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def _run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    status = main(["lm-eval", "--model", "example", *FLAGS, *flags])
    out, err = capsys.readouterr()
    assert status == 0, err
    found: dict[str, Any] = json.loads(out[out.index("{") :])
    return found


def test_tasks_of_every_kind_run_and_share_their_documents(capsys: pytest.CaptureFixture[str]) -> None:
    found = _run(capsys, "--tasks", "facts_choices,facts_answers,facts_text")
    results, facts = found["results"], found["config"]["bicache"]
    items = len((ROOT / "examples" / "choices.jsonl").read_text().splitlines())
    assert results["facts_choices"]["acc,none"] > 0.6 and results["facts_answers"]["exact_match,none"] > 0.6
    assert results["facts_text"]["bits_per_byte,none"] > 0
    assert facts["policy"] == "bicache" and facts["stats"]["rows"] == items
    documents = 3
    assert facts["prefixes"]["misses"] <= 2 * documents + items, "whole prompts only where nothing is shared"
    assert facts["stats"]["prefix_hits"] >= 5 * items


def test_choices_are_those_of_score(capsys: pytest.CaptureFixture[str]) -> None:
    found = _run(capsys, "--tasks", "facts_choices", "--method", "pseudo", "--policy", "none")
    requests = [json.loads(line) for line in (ROOT / "examples" / "choices.jsonl").read_text().splitlines()]
    scores = Engine(load_model("example")).score(
        [
            {"prompt": " ".join(m["content"] for m in one["messages"]), "choices": [f" {c}" for c in one["choices"]]}
            for one in requests
        ],
        method="pseudo",
    )
    right = [score.label == one["answer"] for score, one in zip(scores, requests, strict=True)]
    assert found["results"]["facts_choices"]["acc,none"] == pytest.approx(sum(right) / len(right), abs=0.08)


def test_a_run_that_was_cut_short_continues(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = ("--tasks", "facts_choices,facts_answers", "--limit", "12", "--output", str(tmp_path / "out"))
    whole = _run(capsys, *flags)
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert (
        json.loads(file.read_text())["results"] == whole["results"]
        and not (tmp_path / "out" / command.JOURNAL).exists()
    )
    from bicache_jax.harness.model import BicacheLM

    keep, kept = BicacheLM._keep, []

    def stop(self: Any, record: Any) -> None:
        if len(kept) == 7:
            raise KeyboardInterrupt
        kept.append(record)
        keep(self, record)

    monkeypatch.setattr(BicacheLM, "_keep", stop)
    again = ["lm-eval", "--model", "example", *FLAGS, *flags[:-1], str(tmp_path / "cut")]
    assert main(again) == 130
    monkeypatch.setattr(BicacheLM, "_keep", keep)
    capsys.readouterr()
    assert main(again) == 2 and "--resume" in capsys.readouterr().err
    assert main([*again, "--resume", "--method", "exact"]) == 2 and "estimate was" in capsys.readouterr().err
    resumed = _run(capsys, *flags[:-1], str(tmp_path / "cut"), "--resume")
    assert resumed["config"]["bicache"]["resumed"] == 7
    assert resumed["results"] == whole["results"]


def test_the_harness_finds_the_model_by_its_own_command(tmp_path: Path) -> None:
    arguments = "model=example,method=pseudo,policy=naive,quiet=True"
    words = [*("run", "--model", "bicache", "--model_args", arguments), *("--tasks", "facts_choices", "--limit", "4")]
    words += ["--include_path", "examples/lm_eval", "--output_path", str(tmp_path)]
    child = [sys.executable, "-m", "bicache_jax.lm_eval", *words]
    done = subprocess.run(child, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["config"]["bicache"]["policy"] == "naive" and "acc,none" in found["results"]["facts_choices"]
    wrong = [*child[:3], *words[:4], "model=example,polcy=none", *words[5:]]
    done = subprocess.run(wrong, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "--polcy" in done.stderr.splitlines()[-1]


def test_chat_templates_are_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    model = command.model_of({"pretrained": "example", "quiet": True})
    history = [{"role": "system", "content": "Tom drinks tea ."}, {"role": "user", "content": "what does Tom drink"}]
    assert model.apply_chat_template(history) == "Tom drinks tea . what does Tom drink"
    assert model.apply_chat_template(history, add_generation_prompt=False).endswith("drink")
    assert model.chat_template(True) and model.chat_template(False) is None and model.tokenizer_name == "example"
    found = _run(capsys, "--tasks", "facts_answers", "--apply-chat-template", "--limit", "3")
    assert found["results"]["facts_answers"]["exact_match,none"] >= 0


def test_faults_take_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, said in (
        (["--tasks", "facts_nowhere"], "--tasks: there is no task 'facts_nowhere'"),
        (["--tasks", "facts_choices", "--resume"], "give it"),
        (["--tasks", "facts_choices", "--samples", "20"], "--samples must be a multiple"),
    ):
        assert main(["lm-eval", "--model", "example", "--include-path", "examples/lm_eval", *flags]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
