"""Scores: LLaDA's published formula and every policy in float64, block by block, in any company, on any mesh."""

from __future__ import annotations

import random
from typing import Any

import families
import golden
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from bicache_jax import BicacheError, CacheConfig, Engine, Model, Score, load_model
from bicache_jax.core.layout import noise_words
from bicache_jax.core.masks import every, monte_carlo
from bicache_jax.functional import forward
from bicache_jax.serving.score_requests import ScoreRequest, cut

FULL = pytest.mark.full
PROMPT = tuple(range(20, 47))
TEXT = (61, 33, 102, 8, 77, 54, 91, 12, 70, 44, 29)


def _engine(family: str, **cache: Any) -> Engine:
    return Engine(load_model(golden.FOLDERS[family]), cache=CacheConfig(**cache))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _published(family: str, samples: np.ndarray, batch: int) -> np.ndarray:
    """The estimate of each batch as `get_log_likelihood` of ML-GSAI/LLaDA computes it, on whole logits."""
    config, params = golden.model(family)
    model = reference.Reference.of(config, params)
    places = len(PROMPT) + np.arange(len(TEXT))
    found = []
    for begin in range(0, len(samples), batch):
        loss = 0.0
        for masked in samples[begin : begin + batch]:
            canvas = np.asarray([*PROMPT, *np.where(masked, config.mask_id, TEXT)])
            log_p = _log_softmax(model.run(canvas)[0])[places - config.shift_logits, TEXT]
            loss += (-log_p[masked] / (masked.sum() / len(TEXT))).sum()
        found.append(-loss / batch)
    return np.asarray(found)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_estimate_is_the_published_one(family: str) -> None:
    engine = _engine(family, policy="none")
    request = {"id": "q", "prompt_ids": PROMPT, "continuation_ids": TEXT, "seed": 5}
    (score,) = engine.score(request, samples=24, batch=8)
    masks = monte_carlo((*noise_words("q", 5), 0), len(TEXT), 24, 8)
    wanted = _published(family, masks.distinct[masks.of_sample], 8)
    np.testing.assert_allclose(score.log_likelihood, wanted.mean(), rtol=1e-5)
    np.testing.assert_allclose(wanted.mean(), RECORDED[family], rtol=1e-9)
    assert score.standard_error == pytest.approx(wanted.std(ddof=1) / np.sqrt(3), rel=1e-3)
    assert score.choices[0].tokens == len(TEXT) and score.choices[0].passes == len(masks.distinct)
    assert engine.stats.forward_passes == len(masks.distinct) and engine.stats.scored == 1


RECORDED = {"llada": -138.53256454251547, "dream": -159.33894973173122}


def _under_policy(family: str, masked: np.ndarray, prefix_len: int, boundary: int, interval: int) -> np.ndarray:
    """Sums of masked tokens' log-probabilities, looks in order, under a prefix cache in float64."""
    config, params = golden.model(family)
    canvas = np.asarray([*PROMPT, *TEXT])
    places, found = len(PROMPT) + np.arange(len(TEXT)), []
    stream: Any = None
    for number, mask in enumerate(masked):
        if number % interval == 0:
            stream = reference._Stream(reference.Reference.of(config, params), canvas.copy(), prefix_len, boundary)
        stream.tokens[places] = np.where(mask, config.mask_id, TEXT)
        logits = stream.step(number % interval == 0, np.ones(len(canvas), bool), block_start=False)
        found.append(_log_softmax(logits)[places - config.shift_logits, TEXT][mask].sum())
    return np.asarray(found)


@pytest.mark.parametrize(
    ("family", "boundary", "interval"),
    [("llada", 2, 4), pytest.param("dream", 1, 1, marks=FULL), pytest.param("llada", 99, 4, marks=FULL)],
)
def test_looks_refresh_and_reuse_as_denoising_steps_do(family: str, boundary: int, interval: int) -> None:
    model = load_model(golden.FOLDERS[family])
    boundary = min(boundary, model.config.num_layers)
    engine = Engine(model, cache=CacheConfig(policy="bicache", boundary=boundary, refresh_interval=interval))
    request = {"id": "q", "prompt_ids": PROMPT, "continuation_ids": TEXT, "prefix_len": 22}
    (score,) = engine.score(request, samples=16, batch=8)
    masks = monte_carlo((*noise_words("q", 0), 0), len(TEXT), 16, 8)
    assert len(masks.distinct) == 16, "so that intervals are of full length"
    wanted = masks.estimates(_under_policy(family, masks.distinct, 22, boundary, interval)).mean()
    np.testing.assert_allclose(score.log_likelihood, wanted, rtol=1e-5)
    plain = _engine(family, policy="none").score(request, samples=16, batch=8)[0].log_likelihood
    assert abs(score.log_likelihood / plain - 1) > 1e-5
    assert (score.prefix_len, score.boundary) == (22, boundary)


def _blockwise(model: Model, prompt: tuple[int, ...], text: tuple[int, ...]) -> float:
    """The chain rule over blocks, each over every set of its tokens, from whole logits."""
    config, total, before = model.config, 0.0, prompt
    block = config.block_length
    while text:
        size = min(len(text), block - len(before) % block)
        masks, places = every(size), len(before) + np.arange(size)
        filled = (len(before) + size) // -block * -block - len(before) - size
        canvases = [
            [*before, *np.where(masked, config.mask_id, text[:size]), *[config.mask_id] * filled]
            for masked in masks.distinct
        ]
        log_p = _log_softmax(forward(model.params, config, jnp.asarray(canvases)))
        own = log_p[:, places - config.shifted, text[:size]]
        total += masks.estimates((own * masks.distinct).sum(axis=1))[0]
        before, text = before + text[:size], text[size:]
    return total


@pytest.mark.slow
def test_block_causal_texts_are_scored_block_by_block() -> None:
    model = families.load("sdar")
    prompt, text = tuple(range(20, 38)), (61, 33, 102, 8, 77, 54, 91)
    assert model.config.block_length <= 4 and len(prompt) % model.config.block_length
    request = {"prompt_ids": prompt, "choices_ids": [text, text[:2]]}
    (score,) = Engine(model).score(request, method="exact")
    found = [choice.log_likelihood for choice in score.choices]
    np.testing.assert_allclose(found, [_blockwise(model, prompt, one) for one in (text, text[:2])], rtol=1e-4)
    assert score.choices[0].standard_error == 0 and score.prefix_len > 0
    (plain,) = Engine(model, cache=CacheConfig(policy="none")).score(request, method="exact")
    np.testing.assert_allclose([choice.log_likelihood for choice in plain.choices], found, rtol=1e-5)
    (drawn,) = Engine(model).score(request, samples=512)
    error = drawn.choices[0].standard_error
    assert error and abs(drawn.choices[0].log_likelihood - found[0]) < 5 * error


def _requests() -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    shots = tuple(map(int, rng.integers(2, 290, 40)))
    made = []
    for number in range(5):
        question = tuple(map(int, rng.integers(2, 290, 3 + number)))
        choices = [tuple(map(int, rng.integers(2, 290, size))) for size in (9, 1)[: 1 + number % 2]]
        made.append({"id": f"q{number}", "prompt_ids": shots + question, "choices_ids": choices, "prefix_len": 40})
    return made


def test_a_score_does_not_depend_on_its_company_and_a_task_encodes_its_examples_once() -> None:
    engine, requests = _engine("llada", boundary=3), _requests()
    together = engine.score(requests, samples=16)
    assert [score.id for score in together] == [request["id"] for request in requests]
    assert engine.stats.prefixes_encoded == 1 and engine.stats.scored == sum(map(len, [s.choices for s in together]))
    assert sorted(score.cached_tokens for score in together) == [0, 40, 40, 40, 40]
    detected = [{name: value for name, value in request.items() if name != "prefix_len"} for request in requests]
    assert {score.prefix_len for score in engine.score(detected, samples=16)} == {40}
    assert engine.stats.prefixes_encoded == 1, "the next call finds it in the store"
    shuffled = _engine("llada", boundary=3).score(random.Random(1).sample(requests, 5), samples=16)
    alone = Engine(engine.model, cache=engine.cache, batch_size=1).score(requests[0], samples=16)
    of = {score.id: score for score in together}
    for score in [*shuffled, *alone]:
        for one, other in zip(score.choices, of[score.id].choices, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)
            assert one.standard_error == pytest.approx(other.standard_error, abs=1e-4)
    assert together[1].choices[1].passes == 1 < together[1].choices[0].passes, "equal masks are one look"


def test_choices_share_their_prompt_and_the_likelier_one_is_the_label() -> None:
    model = load_model("example")
    engine = Engine(model, cache=CacheConfig(policy="none"))
    prompt = "Mara lives in Oslo . Mara drinks tea . Tom drinks gin . what does Mara drink"
    request = {"id": "x", "prompt": prompt, "choices": [" gin <eos>", " tea <eos>"]}
    (score,) = engine.score(request, greedy=True)
    assert score.label == 1 and score.best("token") == 1 and score.best("byte") == 1
    assert score.log_likelihood == score.choices[1].log_likelihood > score.choices[0].log_likelihood
    assert [choice.bytes for choice in score.choices] == [10, 10]
    assert [choice.greedy for choice in score.choices] == [False, True]
    (pseudo,) = engine.score(request, method="pseudo")
    assert pseudo.label == 1 and pseudo.choices[0].passes == 1 and pseudo.standard_error is None
    whole = Engine(model)
    assert whole.score(request)[0].prefix_len == score.prompt_len and whole.stats.prefixes_encoded == 1


@pytest.mark.full
@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_greedy_is_what_decoding_gives(family: str) -> None:
    model = families.load(family) if family == "sdar" else load_model(golden.FOLDERS[family])
    engine = Engine(model, cache=CacheConfig() if family == "sdar" else CacheConfig(boundary=2))
    one_a_step = {"entropy_bound": 1e-9} if family == "dream" else {}  # its schedule begins and ends with others
    (made,) = engine.generate({"prompt_ids": PROMPT, "prefix_len": 16, "gen_length": 6, **one_a_step})
    other = (*made.token_ids[:-1], (made.token_ids[-1] + 1) % 200)
    request = {"prompt_ids": PROMPT, "prefix_len": 16, "choices_ids": [made.token_ids, other]}
    (score,) = engine.score(request, method="pseudo", greedy=True)
    assert [choice.greedy for choice in score.choices] == [True, False]


class _Letters:
    """A tokenizer that takes white space with the letter behind it, and puts a token in front of each text."""

    eos_ids = ()

    def encode(self, text: str) -> tuple[int, ...]:
        pieces = text.replace(" ", "_").replace("_", " _").split()
        return (
            1,
            *(40 + len(piece) for word in pieces for piece in ([word[:2], *word[2:]] if word[0] == "_" else word)),
        )


def test_white_space_between_prompt_and_text_belongs_to_the_text() -> None:
    tokenizer: Any = _Letters()
    for prompt, text in (("ab", " cd"), ("ab ", "cd")):
        assert cut(prompt, [text], tokenizer) == ((1, 41, 41), [(42, 41)])


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"prompt_ids": [5]}, "must have exactly one of 'continuation', 'choices'"),
        ({"continuation_ids": [5]}, "must have exactly one of 'prompt'"),
        ({"prompt_ids": [5], "continuation_ids": []}, "'continuation_ids' has no tokens"),
        ({"prompt_ids": [5], "choices_ids": [[5], []]}, "'choices_ids' has no tokens (choice 1)"),
        ({"prompt_ids": [5], "choices_ids": "ab"}, "'choices_ids' must be a list"),
        ({"prompt_ids": [5], "continuation_ids": [10**6]}, "'continuation_ids' holds 1000000"),
        ({"prompt_ids": [5], "continuation_ids": [5] * 10**4}, "exceed the model's"),
        ({"prompt_ids": [5], "continuation": "x"}, "give 'continuation_ids'"),
        ({"prompt_ids": [5], "continuation_ids": [5], "gen_length": 3}, "'gen_length' is not a key"),
        ({"prompt_ids": [5], "continuation_ids": [5], "prefix_len": 2}, "'prefix_len' must be"),
        ({"template_ids": [5, 9], "continuation_ids": [7]}, "'template_ids' is not a key"),
    ],
)
def test_faults_are_named(request_: dict[str, Any], said: str) -> None:
    engine = _engine("llada", policy="none")
    with pytest.raises(BicacheError, match="request: ") as raised:
        engine.score(request_)
    assert said in str(raised.value)
    good = {"id": "good", "prompt_ids": [5, 6], "continuation_ids": [7]}
    bad, kept = engine.score([request_, good], errors="return")
    assert said in (bad.error or "") and "requests[0]" in (bad.error or "") and kept.error is None
    assert bad.to_json() == {"id": "1", "error": bad.error} and kept.to_json()["choices"][0]["tokens"] == 1


def test_requests_made_by_hand_are_checked() -> None:
    engine = _engine("llada", policy="none")
    for texts, prefix_len, said in ((((6,), ()), None, "a text has no tokens"), (((6,),), -3, "prefix_len must lie")):
        with pytest.raises(BicacheError, match=said):
            engine.score(ScoreRequest("a", (5,), texts, prefix_len=prefix_len))


def test_arguments_are_checked() -> None:
    engine, request = _engine("llada", policy="none"), {"prompt_ids": [5], "continuation_ids": [5] * 11}
    for arguments, kind in (
        ({"method": "mc"}, (ValueError, TypeError)),  # the checker of types comes first in tests
        ({"samples": 0}, ValueError),
        ({"samples": 1.5}, TypeError),
        ({"samples": 24, "batch": 16}, ValueError),
        ({"errors": "ignore"}, (ValueError, TypeError)),
        ({"method": "exact"}, BicacheError),
        ({"namespace": 3}, TypeError),
    ):
        with pytest.raises(kind):
            engine.score(request, **arguments)
    with pytest.raises(TypeError):
        engine.score("a text")
    with pytest.raises(TypeError):
        engine.score([3])
    with pytest.raises(BicacheError, match="an id of its own"):
        engine.score([{"id": "a", **request}, {"id": "a", **request}])
    assert Score("x", error="no").to_json() == {"id": "x", "error": "no"}


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = load_model(golden.FOLDERS["llada"])
    engine = Engine(model, cache=CacheConfig(policy="none"))
    engine.update_params({**model.params, "embed": model.params["embed"] * jnp.nan})
    (score,) = engine.score({"prompt_ids": [5], "continuation_ids": [6, 7]}, method="pseudo")
    assert score.engine_fault and "not finite" in (score.error or "")
