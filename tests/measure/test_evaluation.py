from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import golden
import numpy as np
import pytest
import scipy.stats

from bicache_jax import Engine, load_model
from bicache_jax.cli import main
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.types import BicacheError, Request
from bicache_jax.measure.evaluate import Item, compare, evaluate, measure_speed
from bicache_jax.measure.policies import in_forms, parse_policy, weights_of
from bicache_jax.measure.scorers import choice_match, exact_match, find_scorer, numeric_match


def test_scorers() -> None:
    assert exact_match(" Mara  drinks tea ", ["tea", "Mara drinks tea"]) and not exact_match("Mara", ["Mara tea"])
    assert numeric_match("so 3 + 4 = 1,234.50 in all", ["#### 1234.5"]) and not numeric_match("none", ["3"])
    assert not numeric_match("3 and then 5", ["3"])
    assert not choice_match("CAB", ["C"])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (B).", "B"),
        ("b) no. C", "(c)"),
        ("I think that A man would say (D)", "D"),
        ("I would go for C here", "C"),
        ("A. Because B and C are wrong", "A"),
        ("Not B, since it rains. Answer: E", "E"),
        ("A", "a"),
    ],
)
def test_the_letter_that_is_chosen(text: str, answer: str) -> None:
    assert choice_match(text, [answer])
    assert not any(choice_match(text, [other]) for other in "ABCDEFGHIJ" if other != answer.strip("()").upper())


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3-5", "5", True),
        ("it is -5", "5", False),
        ("it is -5", "-5", True),
        ("$1,200.", "1200.0", True),
        ("5", "x", False),
    ],
)
def test_the_number_that_is_said(text: str, answer: str, right: bool) -> None:
    assert numeric_match(text, [answer]) is right


def test_a_scorer_may_be_named_by_import_path() -> None:
    assert find_scorer("bicache_jax.measure.evaluate:exact_match") is exact_match
    for name in ("nothing", "json:nothing", "no.such.module:f"):
        with pytest.raises(BicacheError, match="scorer"):
            find_scorer(name)


def test_policies_by_name() -> None:
    cache = CacheConfig(boundary=3, refresh_interval=5)
    wanted = CacheConfig(policy="bicache", boundary=3, refresh_interval=5, block_cache="dual")
    assert parse_policy("bicache+dual", cache) == wanted
    assert parse_policy("none", cache).boundary == "auto"
    with pytest.raises(BicacheError, match="bicash"):
        parse_policy("bicash", cache)
    assert parse_policy("bicache+dual@w8+int8", cache) == dataclasses.replace(wanted, cache_dtype="int8")
    assert weights_of("bicache+dual@w8+int8") == "w8" and not weights_of("bicache@int8")
    with pytest.raises(BicacheError, match="'int4' is neither"):
        parse_policy("bicache@int4", cache)


def test_policies_in_forms() -> None:
    policies = ["none", "bicache+dual"]
    assert in_forms(policies, ["none"], ["auto"]) == policies
    assert in_forms(policies, ["none"], ["int8"]) == ["none", "bicache+dual@int8"], "it says what it is"
    of_weights = [*policies, "none@w8", "bicache+dual@w8"]
    assert in_forms(policies, ["none", "w8"], ["auto"]) == of_weights
    both = [*policies, "bicache+dual@int8", "none@w8", "bicache+dual@w8", "bicache+dual@w8+int8"]
    assert in_forms(policies, ["none", "w8"], ["auto", "int8"]) == both


def test_differences_are_judged_as_scipy_does() -> None:
    rng = np.random.default_rng(0)
    reference = rng.random(300) < 0.8
    right = np.where(rng.random(300) < 0.15, rng.random(300) < 0.3, reference)
    found = compare(right.tolist(), reference.tolist())
    gained, lost = int((right & ~reference).sum()), int((reference & ~right).sum())
    assert found.p_value == pytest.approx(scipy.stats.binomtest(gained, gained + lost).pvalue)
    assert found.difference == pytest.approx(right.mean() - reference.mean())
    wanted = scipy.stats.bootstrap(
        (right.astype(float), reference.astype(float)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        random_state=np.random.default_rng(1),  # `rng` from scipy 1.15 on
    ).confidence_interval
    np.testing.assert_allclose(found.interval, wanted, atol=0.01)
    exact = compare([True] * 2 + [False] * 8 + [True] * 90, [False] * 2 + [True] * 98)
    assert exact.p_value == pytest.approx(2 * scipy.stats.binom.cdf(2, 10, 0.5)) == pytest.approx(0.109375)
    same = compare(reference.tolist(), reference.tolist())
    assert (same.difference, same.p_value, same.interval) == (0.0, 1.0, (0.0, 0.0))


@pytest.mark.full
def test_the_command_prints_what_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    command = "evaluate --model example --task example --policies none,bicache --samples 12 --seed 3 --json"
    assert main([*command.split(), "--no-compilation-cache"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [result["policy"] for result in printed["results"]] == ["none", "bicache"]
    first = printed["results"][0]
    assert first["agreement"] == 1.0 and first["samples"] == 12 and first["tokens_per_s"] > 0
    assert sum(kind["samples"] for kind in first["by_kind"].values()) == 12
    right = sum(round(kind["exact_match"] * kind["samples"]) for kind in first["by_kind"].values())
    assert first["exact_match"] == pytest.approx(right / 12, abs=1e-5)
    assert first["forward_passes"] <= 12 * 16 and first["prefixes_encoded"] == 0
    second = printed["results"][1]
    assert second["prefixes_encoded"] == 2 and second["limit"] > 1 and second["ratio"] > 0


SAMPLING = SamplingConfig(gen_length=4)


def _task(folder: Path) -> tuple[Path, list[dict[str, object]]]:
    """A task file for a golden checkpoint, whose right answers are what it says without a cache, but for one."""
    model = load_model(golden.FOLDERS["llada"])
    shared = list(range(20, 40))
    records: list[dict[str, object]] = [
        {"id": f"q{i}", "prompt_ids": [*shared, 50 + i], "prefix_len": 20, "kind": "even" if i % 2 == 0 else "odd"}
        for i in range(4)
    ]
    engine = Engine(model, cache=CacheConfig(policy="none"), sampling=SAMPLING)
    for record, result in zip(records, engine.generate(records), strict=True):
        ends = [place for place, token in enumerate(result.token_ids) if token in model.config.eos_ids]
        record["answer"] = ["other", " ".join(map(str, result.token_ids[: ends[0] if ends else None]))]
    records[3]["answer"] = "7 7 7"
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path, records


def _run(task: Path, *flags: str) -> int:
    common = ["--gen-length", "4", "--no-compilation-cache", "--json"]
    return main(["evaluate", "--model", str(golden.FOLDERS["llada"]), "--task", str(task), *common, *flags])


@pytest.mark.slow
def test_policies_are_compared_with_none_wherever_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = _task(tmp_path)
    assert _run(task, "--policies", "naive,bicache,none", "--boundary", "0", "--refresh-interval", "1") == 0
    naive, exact, none = json.loads(capsys.readouterr().out)["results"]
    # b = 0 with N = 1 recomputes everything in every step: the very answers of none.
    for result in (none, exact):
        assert result["agreement"] == 1.0 and result["difference"] == 0.0 and result["exact_match"] == 0.75
        assert result["by_kind"]["even"] == {"exact_match": 1.0, "samples": 2}
        assert result["by_kind"]["odd"] == {"exact_match": 0.5, "samples": 2}
        assert result["by_ratio"] == {"80-89": {"exact_match": 0.75, "samples": 4}}
    assert naive["compared_with"] == "none" and none["ratio"] == none["limit"] == 1.0
    assert naive["difference"] == pytest.approx(naive["exact_match"] - 0.75)
    assert naive["agreement"] < 1  # a random model's answers do not survive it

    (tmp_path / "my_scorer.py").write_text("def score(text, answers):\n    return '7 7 7' in answers\n")
    monkeypatch.chdir(tmp_path)
    flags = ["--policies", "naive", "--scorer", "my_scorer:score", "--timed", "0"]
    assert _run(task, *flags) == 0
    (alone,) = json.loads(capsys.readouterr().out)["results"]
    assert alone["exact_match"] == 0.25 and alone["agreement"] is None and alone["tokens_per_s"] is None


@pytest.mark.slow
def test_nothing_compiles_while_the_clock_runs() -> None:
    model = load_model(golden.FOLDERS["llada"])
    sampling = dataclasses.replace(SAMPLING, gen_length=8)
    requests = [Request(str(i), (*range(20, 40), 50 + i), 20, sampling, index=i) for i in range(3)]
    engines = [Engine(model, cache=CacheConfig(policy=policy), sampling=sampling) for policy in ("none", "naive")]
    counts: list[int] = []
    times = measure_speed(
        engines, requests, turns=2, progress=lambda done: counts.append(engines[0].stats.compilations)
    )
    assert times.shape == (2, 2) and (times > 0).all()
    assert counts[0] > 0 and counts[1:] == [counts[1]] * 5


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("\n", [], "there are no requests in it"),
        ('{"prompt_ids": [5]}\n', [], "request '1' needs an 'answer'"),
        ('{"prompt_ids": [5], "answer": {"a": 1}}\n', [], "request '1' needs an 'answer'"),
        ('{"prompt_ids": [5], "answer": "5"}\n{"prompt_ids\n', [], "line 2"),
        ('{"prompt_ids": [5], "answer": "5"}\n', ["--scorer", "broken_scorer:score"], "SyntaxError"),
        ('{"prompt_ids": [5], "answer": "5"}\n', ["--policies", "bicash"], "policy 'bicash'"),
        ('{"prompt_ids": [5], "answer": "5"}\n', ["--policies", ","], "--policies"),
        ('{"prompt_ids": [5], "answer": "5"}\n', ["--boundary-table", "deep.json"], "is for a model of 5 layers"),
        ('{"prompt_ids": [5], "answer": "5"}\n', ["--policies", "bicache"], "bicache profile"),
        ('{"prompt_ids": [5], "answer": "5"}\n', ["--attention", "pallas_tpu"], "attention"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_scorer.py").write_text("def score(:\n")
    (tmp_path / "deep.json").write_text(json.dumps({"num_layers": 5, "table": {"0": 1}}))
    (tmp_path / "task.jsonl").write_text(content)
    assert _run(tmp_path / "task.jsonl", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("bicache: error: ") and error.count("\n") == 1 and message in error


def test_a_scorer_that_fails_names_the_request() -> None:
    model = load_model(golden.FOLDERS["llada"])
    item = Item(Request("q7", (5, 6), 0, SAMPLING), ("5",))

    def fails(text: str, answers: object) -> bool:
        raise KeyError("no")

    with pytest.raises(BicacheError, match="q7.*KeyError"):
        evaluate(model, [item], ["none"], cache=CacheConfig(), sampling=SAMPLING, scorer=fails)
    with pytest.raises(BicacheError, match="no questions"):
        evaluate(model, [], ["none"], cache=CacheConfig(), sampling=SAMPLING)
