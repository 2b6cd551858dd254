"""Every decoder with every policy, token for token equal to one slow reference (`tests/reference.py`)."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import golden
import numpy as np
import pytest
import reference

from bicache_jax import CacheConfig, Engine, Model, Request, Result, SamplingConfig, load_model
from bicache_jax.core.config import BLOCK_CACHES, REMASKING, Remasking
from bicache_jax.decoding.interval import decode
from bicache_jax.serving.compilation import CompileCounter

FAMILIES = tuple(golden.FOLDERS)
INTERVALS = (1, 3, 4, 16)
PREFIXES = {16: 0, 24: None, 30: 6}  # boundary of each prefix length; None: drawn
SMALLEST_GAP = 1e-4  # decisions closer than this may fall either way in float32


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """The golden models, with tokens that end a text so common that they matter."""
    made = {}
    for family, folder in golden.FOLDERS.items():
        model = load_model(folder)
        config = dataclasses.replace(model.config, eos_ids=tuple(range(3, 290, 14)), eot_ids=(17, 31, 59))
        made[family] = dataclasses.replace(model, config=config)
    return made


@pytest.fixture(scope="module")
def references(models: dict[str, Model]) -> dict[str, reference.Reference]:
    return {family: reference.Reference.of(model.config, model.params) for family, model in models.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A cell of the matrix; everything that the cell leaves open is drawn from its seed."""

    family: str
    remasking: str
    block_cache: str
    refresh_interval: int
    seed: int
    guided: bool = False

    def sampling(self) -> SamplingConfig:
        draw = random.Random(repr(self))
        counts = {"threshold": [0.1, 0.3], "factor": [0.9, 1.6], "entropy_bound": [6.0, 14.0]}
        count = draw.choice([{}, {}, *({name: draw.choice(values)} for name, values in counts.items())])
        filters = draw.choice([{}, {}, {"top_p": 0.7}, {"top_k": 5}, {"top_p": 0.9, "top_k": 12}])
        settings: dict[str, Any] = {
            "temperature": draw.choice([0.0, 0.0, 0.3, 1.0]),
            "alg_temperature": draw.choice([0.0, 0.0, 0.2]),
            "logits_eos_inf": draw.random() < 0.2,
            "confidence_eos_eot_inf": draw.random() < 0.3,
            "early_stop": draw.random() < 0.5,
            "cfg_scale": draw.choice([0.5, 1.5]) if self.guided else 0.0,
        }
        return SamplingConfig(16, draw.choice([8, 16]), 8, remasking=self.remasking, **count, **filters, **settings)

    def boundary(self) -> int:
        return random.Random(repr(self) + "b").randrange(1, 6)

    def requests(self) -> list[Request]:
        """Two rows for each boundary, each with a prefix of its own: batches of one shape."""
        rng = np.random.default_rng(self.seed)
        made = []
        for size, which in itertools.product(PREFIXES, range(2)):
            prompt = tuple(map(int, rng.integers(2, 290, size + rng.integers(18, 27))))
            made.append(Request(f"{self.seed}/{size}/{which}", prompt, size, self.sampling(), index=len(made)))
        return made

    def cache(self, **changes: Any) -> CacheConfig:
        table = {0: 0, 34: self.boundary(), 42: 6}
        interval: Any = self.refresh_interval
        return CacheConfig(table=table, refresh_interval=interval, block_cache=self.block_cache, **changes)  # type: ignore[arg-type]

    def wanted(self, model: reference.Reference, request: Request) -> reference.Outcome:
        assert request.prefix_len is not None
        boundary = PREFIXES[request.prefix_len]
        return reference.denoise(
            model,
            request.prompt_ids,
            request.sampling,
            name=request.id,
            prefix_len=request.prefix_len,
            boundary=self.boundary() if boundary is None else boundary,
            refresh_interval=self.refresh_interval,
            block_cache=self.block_cache,
        )


# Those of the published loops of these families.
RULES: tuple[Remasking, ...] = tuple(rule for rule in REMASKING if rule != "sequential")


def _matrix() -> list[Case]:
    cells = itertools.product(FAMILIES, BLOCK_CACHES, RULES, INTERVALS, (False, True))
    return [
        Case(family, rule, block_cache, interval, seed, guided)
        for seed, (family, block_cache, rule, interval, guided) in enumerate(cells)
    ]


def _sample() -> list[Case]:
    """Every rule with every family and every block cache with every interval, few of them together."""
    plain = [case for case in _matrix() if not case.guided]
    rules, intervals = len(RULES), len(INTERVALS)
    picked = [case for place, case in enumerate(plain) if (place // intervals + place // (intervals * rules)) % 3 == 0]
    picked = [case for place, case in enumerate(picked) if place % intervals == (place // intervals) % intervals]
    guided = [case for case in _matrix() if case.guided]
    return picked + [next(case for case in guided if case.family == family) for family in FAMILIES]


def _check(case: Case, model: Model, slow: reference.Reference, results: list[Result]) -> int:
    """Compares results with the reference; returns how many decisions were too close to tell."""
    close = 0
    for request, result in zip(case.requests(), results, strict=True):
        wanted = case.wanted(slow, request)
        if result.token_ids != wanted.tokens and wanted.gap < SMALLEST_GAP:
            close += 1
            continue
        assert result.token_ids == wanted.tokens, (case, case.sampling(), request.id, wanted.gap)
        assert result.forward_passes == result.steps == wanted.passes, (case, request.id)
        assert wanted.passes <= (16 if case.sampling().by_confidence else case.sampling().num_steps)
    return close


@pytest.mark.slow
def test_the_reference_gives_the_recorded_tokens() -> None:
    names = {
        "llada": ["llada_s10_g32_b32", "llada_s16_g32_b8", "bicache_P16_b3_N4", "bicache_semi_P30_b3_N7"]
        + ["fast_prefix_t0.9", "fast_dual_tNone", "bicache_dual_P16_b3_N7", "bicache_prefix_P30_b3_N4_t0.5"],
        "dream": ["dream_topk_margin_s10", "dream_entropy_s16", "dream_bicache_maskgit_plus_P39_b3_N4"]
        + ["dream_fast_prefix_t0.9", "dream_bicache_dual_P16_b3_N4_s16"],
    }
    for family, wanted in names.items():
        config, params = golden.model(family)
        model, prompt = reference.Reference.of(config, params), golden.expected(family)["prompt"][0]
        logits, *_ = model.run(golden.expected(family)["forward_ids"][0])
        np.testing.assert_allclose(logits, golden.expected(family)["forward_logits"][0], atol=1e-4)
        for name in wanted:
            case = golden.cases(family)[name]
            out = reference.denoise(
                model,
                tuple(map(int, prompt)),
                golden.sampling(case),
                prefix_len=case.get("prefix_len", 0),
                boundary=case.get("boundary", 0),
                refresh_interval=case.get("refresh_interval", 1),
                block_cache=golden.block_cache(name),
            )
            assert out.tokens == tuple(map(int, golden.expected(family)[name][0, len(prompt) :])), name
            assert out.passes == case["nfe"] and out.gap > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.full) for name in FAMILIES[1:])]
)
@pytest.mark.parametrize("block_cache", ["off", "dual", pytest.param("prefix", marks=pytest.mark.full)])
def test_a_sample_of_the_matrix(
    models: dict[str, Model], references: dict[str, reference.Reference], family: str, block_cache: str
) -> None:
    """And no program is compiled for another rule, boundary, interval or sampling setting."""
    compiled, close = CompileCounter(), 0
    for guided in (False, True):
        counts = []
        for case in _sample():
            if (case.family, case.block_cache, case.guided) == (family, block_cache, guided):
                results = Engine(models[family], cache=case.cache()).generate(case.requests())
                close += _check(case, models[family], references[family], results)
                counts.append(compiled.count)
        assert len(set(counts)) <= 1, counts
    assert close <= 1


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("batch_size", [1, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_matrix(
    models: dict[str, Model], references: dict[str, reference.Reference], family: str, batch_size: int | None
) -> None:
    close = total = 0
    for case in _matrix():
        if case.family == family:
            engine = Engine(models[family], cache=case.cache(), batch_size=batch_size)
            close += _check(case, models[family], references[family], engine.generate(case.requests()))
            total += len(case.requests())
    assert close <= 0.02 * total


@pytest.mark.full
def test_a_prefix_block_cache_compiles_one_program_for_each_window(models: dict[str, Model]) -> None:
    model = models["llada"]
    sampling = SamplingConfig(16, 16, 8, threshold=0.2)
    requests = [Request(f"{i}", tuple(range(2 + i, 40 + i)), 20, sampling, index=i) for i in range(3)]
    before = decode._cache_size()
    for interval, boundary in ((4, 2), (3, 1)):
        cache = CacheConfig(boundary=boundary, refresh_interval=interval, block_cache="prefix")
        Engine(model, cache=cache).generate(requests)
        assert decode._cache_size() - before == 2  # windows of 16 and 8 tokens
