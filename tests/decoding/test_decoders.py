"""Decoders through the engine: guidance and the prefix cache, early stops, prompts that are all prefix."""

from __future__ import annotations

import dataclasses
from typing import Any

import golden
import numpy as np
import pytest

from bicache_jax import CacheConfig, Engine, Model, Request, SamplingConfig, load_model


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(golden.FOLDERS["llada"])


def _requests(sampling: SamplingConfig, count: int = 4) -> list[Request]:
    rng = np.random.default_rng(11)
    prefix = tuple(map(int, rng.integers(2, 290, 30)))
    rests = [tuple(map(int, rng.integers(2, 290, 9 + index))) for index in range(count)]
    return [Request(f"{i}", prefix + rest, 30, sampling, index=i) for i, rest in enumerate(rests)]


def _tokens(
    model: Model, requests: list[Request], batch_size: int | None = None, **cache: Any
) -> list[tuple[int, ...]]:
    results = Engine(model, cache=CacheConfig(**cache), batch_size=batch_size).generate(requests)
    return [result.token_ids for result in results]


@pytest.mark.slow
def test_guidance_caches_its_masks_as_it_caches_the_prefix(model: Model) -> None:
    """Refreshed always from the first layer on, both caches change nothing; and neither do neighbours."""
    requests = _requests(SamplingConfig(16, 8, cfg_scale=1.5, temperature=0.4, top_p=0.9))
    exact = _tokens(model, requests, policy="none")
    assert _tokens(model, requests, boundary=0, refresh_interval=1) == exact
    unguided = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, cfg_scale=0.0)) for r in requests]
    assert _tokens(model, unguided, policy="none") != exact
    cached = _tokens(model, requests, boundary=3, refresh_interval=4)
    assert _tokens(model, requests[::-1], batch_size=1, boundary=3, refresh_interval=4) == cached[::-1]


def test_an_early_stop_spares_passes_and_no_token_before_the_end(model: Model) -> None:
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_ids=tuple(range(3, 290, 14))))
    whole = _requests(SamplingConfig(32, 16, 8), 8)
    early = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, early_stop=True)) for r in whole]
    engines = [Engine(model, cache=CacheConfig(boundary=3, refresh_interval=3)) for _ in range(2)]
    spared = 0
    for long, short in zip(engines[0].generate(whole), engines[1].generate(early), strict=True):
        ends = [place for place, token in enumerate(long.token_ids) if token in model.config.eos_ids]
        end = ends[0] if ends else 31
        assert short.token_ids[: end + 1] == long.token_ids[: end + 1]
        assert short.finish_reason == long.finish_reason and model.config.mask_id not in short.token_ids
        assert short.forward_passes == 4 * (end // 8 + 1)
        spared += long.forward_passes - short.forward_passes
    assert engines[1].stats.passes_saved == spared > 0
    assert engines[0].stats.passes_saved == 0


def test_a_prompt_that_is_all_prefix_gives_a_token_back_where_logits_are_shifted() -> None:
    dream = load_model(golden.FOLDERS["dream"])
    prompt = tuple(range(5, 45))
    asked = [Request("all", prompt, 40, SamplingConfig(8)), Request("most", prompt, 39, SamplingConfig(8))]
    results = Engine(dream, cache=CacheConfig(boundary=3)).generate(asked)
    assert [result.prefix_len for result in results] == [39, 39]
    assert results[0].token_ids == results[1].token_ids
