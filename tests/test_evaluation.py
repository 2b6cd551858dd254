from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats

from bicache_jax.config import CacheConfig
from bicache_jax.evaluation import choice_match, compare, exact_match, find_scorer, numeric_match, parse_policy
from bicache_jax.types import BicacheError


def test_scorers() -> None:
    assert exact_match(" Mara  drinks tea ", ["tea", "Mara drinks tea"]) and not exact_match("Mara", ["Mara tea"])
    assert numeric_match("so 3 + 4 = 1,234.50 in all", ["#### 1234.5"]) and not numeric_match("none", ["3"])
    assert not numeric_match("3 and then 5", ["3"])
    assert choice_match("The answer is (B).", ["B"]) and choice_match("b) no. C", ["(c)"])
    assert not choice_match("CAB", ["C"])


def test_a_scorer_may_be_named_by_import_path() -> None:
    assert find_scorer("bicache_jax.evaluation:exact_match") is exact_match
    for name in ("nothing", "json:nothing", "no.such.module:f"):
        with pytest.raises(BicacheError, match="scorer"):
            find_scorer(name)


def test_policies_by_name() -> None:
    cache = CacheConfig(boundary=3, refresh_interval=5)
    assert parse_policy("bicache+dual", cache) == CacheConfig(boundary=3, refresh_interval=5, block_cache="dual")
    assert parse_policy("none", cache).boundary == "auto"
    with pytest.raises(BicacheError, match="bicash"):
        parse_policy("bicash", cache)


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
        rng=np.random.default_rng(1),
    ).confidence_interval
    np.testing.assert_allclose(found.interval, wanted, atol=0.01)
    same = compare(reference.tolist(), reference.tolist())
    assert (same.difference, same.p_value, same.interval) == (0.0, 1.0, (0.0, 0.0))


def test_the_command_prints_what_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    from bicache_jax.cli import main

    command = "evaluate --model example --task example --policies none,naive,bicache --samples 12 --seed 3 --json"
    assert main([*command.split(), "--no-compilation-cache"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [result["policy"] for result in printed["results"]] == ["none", "naive", "bicache"]
    first = printed["results"][0]
    assert first["agreement"] == 1.0 and first["samples"] == 12 and first["tokens_per_s"] > 0
    assert sum(kind["samples"] for kind in first["by_kind"].values()) == 12
    right = sum(round(kind["exact_match"] * kind["samples"]) for kind in first["by_kind"].values())
    assert first["exact_match"] == pytest.approx(right / 12, abs=1e-5)
    assert first["forward_passes"] <= 12 * 16 and first["prefixes_encoded"] == 0
    assert printed["results"][1]["prefixes_encoded"] == 2
