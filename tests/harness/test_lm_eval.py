"""The real lm-evaluation-harness on tasks that need no network, over the bundled model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install 'bicache-jax[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402

from bicache_jax import BicacheError, Engine, load_model  # noqa: E402
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
    results, did = found["results"], found["config"]["bicache"]
    lines = (ROOT / "examples" / "choices.jsonl").read_text().splitlines()
    items = len(lines)
    facts = map(json.loads, lines)
    distinct = {json.dumps([fact["messages"], fact["choices"]]): len(fact["choices"]) for fact in facts}
    assert results["facts_choices"]["acc,none"] > 0.6 and results["facts_answers"]["exact_match,none"] > 0.6
    assert results["facts_text"]["bits_per_byte,none"] > 0
    assert did["policy"] == "bicache" and did["stats"]["rows"] == items
    documents = 3
    assert did["prefixes"]["misses"] <= 2 * documents + items, "whole prompts only where nothing is shared"
    assert did["stats"]["prefix_hits"] >= sum(distinct.values()) + items - documents


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
    assert main([*again, "--resume", "--limit", "11"]) == 2 and "limit was 12" in capsys.readouterr().err
    resumed = _run(capsys, *flags[:-1], str(tmp_path / "cut"), "--resume")
    assert resumed["config"]["bicache"]["resumed"] == 7
    assert resumed["results"] == whole["results"]


def _asked(doc_id: int, context: str, *texts: str) -> list[Any]:
    """What the harness asks about a document."""
    return [
        Instance("loglikelihood", {}, (context, text), number, ("task", doc_id, 1)) for number, text in enumerate(texts)
    ]


def test_documents_depend_on_no_other() -> None:
    model = command.model_of({"model": "example", "quiet": True, "policy": "none", "samples": 8, "batch": 4})
    lines = (ROOT / "examples" / "choices.jsonl").read_text().splitlines()
    fact = json.loads(lines[1])
    context = " ".join(message["content"] for message in fact["messages"])
    right, wrong = (f" {fact['choices'][at]}" for at in (fact["answer"], fact["answer"] - 1))
    documents = [
        _asked(0, context, right),
        _asked(1, context, wrong),
        _asked(2, context, right, wrong),
        _asked(3, "", "Tom drinks tea .", "tea drinks Tom ."),
        _asked(4, "", "who keeps doves"),
    ]
    together = model.loglikelihood([one for document in documents for one in document])
    alone = [answer for document in documents for answer in model.loglikelihood(document)]
    assert [found for found, _ in together] == pytest.approx([found for found, _ in alone], abs=1e-3)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [greedy for _, greedy in together[:4]] == [True, False, False, False]


def test_answers_among_other_requests_are_not_used_again() -> None:
    model = command.model_of({"model": "example", "quiet": True, "method": "pseudo"})
    engine, first = model._session.engine, _asked(0, "Tom drinks", " tea", " milk")
    found = model.loglikelihood(first)
    assert model.loglikelihood(first) == found and engine.stats.scored == 2
    model.loglikelihood([*first, *_asked(1, "Ann drinks", " tea", " milk")])
    assert engine.stats.scored == 6


def test_texts_without_tokens_are_certain() -> None:
    model = command.model_of({"model": "example", "quiet": True, "method": "pseudo"})
    requests = [*_asked(0, "Tom drinks", ""), *_asked(1, "Tom drinks", "", " tea"), *_asked(2, "", "")]
    found = model.loglikelihood(requests)
    assert found[:2] == [(0.0, True)] * 2 and found[2][0] < 0 and found[3] == (0.0, True)
    assert model._session.engine.stats.scored == 1


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
    model._tokenizer = SimpleNamespace(chat_text=lambda *_, **__: "other words")
    with pytest.raises(BicacheError, match="begin with"):
        model.apply_chat_template(history, add_generation_prompt=False)
    found = _run(capsys, "--tasks", "facts_answers", "--apply-chat-template", "--limit", "3")
    assert found["results"]["facts_answers"]["exact_match,none"] >= 0


def test_tasks_may_be_patterns(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(_run(capsys, "--tasks", "facts_ch*", "--limit", "2")["results"]) == ["facts_choices"]


def test_faults_take_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, broken, missing = (tmp_path / name for name in ("file", "broken", "missing"))
    file.write_text("")
    for folder, text in (
        (broken, "task: [facts"),
        (missing, "task: lost\ndataset_path: nowhere/lost\ntest_split: test"),
    ):
        folder.mkdir()
        (folder / "task.yaml").write_text(text)
    for flags, said in (
        (["--tasks", "facts_nowhere"], "--tasks: there is no task 'facts_nowhere'"),
        (["--tasks", "facts_choices", "--resume"], "give it"),
        (["--tasks", "facts_choices", "--output", str(file)], "--output"),
        (["--tasks", "facts_broken", "--include-path", str(broken)], f"--include-path: cannot read {broken}"),
        (["--tasks", "lost", "--include-path", str(missing), "--quiet"], "--tasks lost: cannot be loaded"),
        (["--tasks", "facts_choices", "--samples", "20"], "--samples must be a multiple"),
    ):
        assert main(["lm-eval", "--model", "example", "--include-path", "examples/lm_eval", *flags]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
