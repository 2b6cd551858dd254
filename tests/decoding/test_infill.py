"""Holes of a template: tokens of the public infilling loop, and of a float64 reference under every cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import families
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from bicache_jax import CacheConfig, Engine, Model, Request, SamplingConfig, denoise, encode_prefix, forward, load_model
from bicache_jax.decoding.schedule import linear_counts, time_counts
from bicache_jax.serving.compilation import CompileCounter

Holes = tuple[tuple[int, int], ...]
LENGTH = 48
SEVERAL: tuple[Holes, ...] = (
    ((10, 4), (16, 7), (40, 1)),  # between known text, which also ends the sequence
    ((30, 2), (32, 6), (44, 4)),  # two without text between them, and one at the end
    ((3, 12),),
)
SMALLEST_GAP = 1e-4
"""Closer decisions may go either way in float32."""
_forward = jax.jit(forward, static_argnames=("config",))


def template(seed: int, holes: Holes, length: int = LENGTH) -> list[int]:
    """A sequence of random known tokens, with masks of id -1."""
    ids = np.random.default_rng(seed).integers(6, 260, length)
    for place, size in holes:
        ids[place : place + size] = -1
    return ids.tolist()


def asked(name: str, ids: Sequence[int], holes: Holes, **settings: Any) -> Request:
    sampling = SamplingConfig(**settings)
    return Request(name, tuple(token for token in ids if token >= 0), None, sampling, holes=holes)


@functools.cache
def load(family: str) -> Model:
    return load_model(golden.FOLDERS[family]) if family in golden.FOLDERS else families.load(family)


def ending(family: str) -> Model:
    """A golden model for which many tokens end a text."""
    config = dataclasses.replace(load(family).config, eos_ids=tuple(range(3, 290, 4)))
    return dataclasses.replace(load(family), config=config)


def public_infill(
    model: Model, ids: Sequence[int], window: int, counts_of: Callable[[int], Sequence[int]], *, entropy: bool = False
) -> tuple[int, ...]:
    """The public loop (dllm's `infill`): window by window over the whole sequence, masks are filled by confidence.

    Each step runs the whole sequence; in families that shift logits a position is predicted from the one before it, and
    the first from itself. As everywhere here, the mask token is never chosen.
    """
    mask_id = model.config.mask_id
    canvas = np.asarray([mask_id if token < 0 else token for token in ids])
    for start in range(0, len(canvas), window):
        inside = np.arange(start, min(start + window, len(canvas)))
        for count in counts_of(int((canvas[inside] == mask_id).sum())):
            logits = np.asarray(_forward(model.params, model.config, jnp.asarray(canvas)[None])[0], np.float64)
            if model.config.shift_logits:
                logits = np.concatenate([logits[:1], logits[:-1]])
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            logits[:, mask_id] = -np.inf
            tokens = logits.argmax(-1)
            sure = p[np.arange(len(p)), tokens]
            if entropy:
                sure = (p * np.log(p)).sum(-1)
            masked = [place for place in inside if canvas[place] == mask_id]
            best = sorted(masked, key=lambda place: -sure[place])[:count]
            canvas[best] = tokens[best]
    return tuple(map(int, canvas))


def even(steps: int) -> Callable[[int], list[int]]:
    """As many tokens in each step, one more in the first ones."""
    return lambda masks: [masks // steps + (step < masks % steps) for step in range(steps)]


@pytest.mark.parametrize("family", ["llada", "dream", pytest.param("a2d-qwen3", marks=pytest.mark.full)])
def test_the_public_loop_fills_holes_with_the_same_tokens(family: str) -> None:
    """In one call with requests that have no holes; the public loops' one window is the whole sequence."""
    model, steps = load(family), 5
    eps = model.config.time_eps
    counts_of = {
        "llada": even(steps),
        "dream": lambda masks: time_counts(masks, steps, anchored=False, eps=eps).tolist(),
        "a2d-qwen3": lambda masks: linear_counts(masks, steps).tolist(),
    }[family]
    made = [(template(seed, holes), holes) for seed, holes in enumerate(SEVERAL)]
    requests = [asked(f"hole{i}", ids, holes, steps=steps) for i, (ids, holes) in enumerate(made)]
    ordinary = Request("ordinary", tuple(range(20, 56)), None, SamplingConfig(12, steps))
    results = Engine(model, cache=CacheConfig(policy="none"), batch_size=3).generate([ordinary, *requests])
    for result, request, (ids, holes) in zip(results[1:], requests, made, strict=True):
        wanted = public_infill(model, ids, LENGTH, counts_of, entropy=model.config.remasking == "entropy")
        assert (*request.prompt_ids[: request.lead], *result.token_ids) == wanted
        assert [hole.token_ids for hole in result.holes] == [wanted[at : at + size] for at, size in holes]
        assert result.decoded == sum((hole.token_ids for hole in result.holes), ())
        assert result.forward_passes == len([count for count in counts_of(12) if count])


@pytest.mark.full
def test_holes_that_are_windows_of_the_public_loop_are_blocks() -> None:
    holes, model = ((8, 8), (24, 8), (40, 8)), load("llada")
    ids = template(7, holes)
    request = asked("windows", ids, holes, block_length=8, steps_per_block=3)
    (result,) = Engine(model, cache=CacheConfig(policy="none")).generate(request)
    windows = public_infill(model, ids, 8, lambda masks: even(3)(masks) if masks else [])
    assert (*ids[:8], *result.token_ids) == windows != public_infill(model, ids, LENGTH, even(9))


CACHES: dict[str, dict[str, Any]] = {
    "off": {"boundary": 2, "refresh_interval": 3},
    "dual": {"boundary": 2, "refresh_interval": 2, "block_cache": "dual"},
    "prefix": {"boundary": 2, "refresh_interval": 2, "block_cache": "prefix"},
}


@pytest.mark.parametrize(
    ("family", "block_cache", "settings"),
    [
        ("dream", "dual", {"early_stop": True}),
        pytest.param("llada", "off", {"early_stop": True, "block_length": 6}, marks=pytest.mark.full),
        pytest.param("dream", "off", {"temperature": 0.6, "early_stop": True}, marks=pytest.mark.full),
        pytest.param("llada", "dual", {"threshold": 0.02}, marks=pytest.mark.full),
        pytest.param("dream", "prefix", {"steps": 9}, marks=pytest.mark.full),
        pytest.param("llada", "off", {"cfg_scale": 1.0}, marks=pytest.mark.full),
        pytest.param("dream", "dual", {"threshold": 0.02}, marks=pytest.mark.full),
        pytest.param("llada", "prefix", {"threshold": 0.02, "early_stop": True}, marks=pytest.mark.full),
        pytest.param("dream", "dual", {"cfg_scale": 1.0, "alg_temperature": 0.4}, marks=pytest.mark.full),
    ],
)
def test_every_cache_gives_the_tokens_of_the_reference_in_any_company(
    family: str, block_cache: str, settings: dict[str, Any]
) -> None:
    """A last block may be shorter; an end of text closes its own hole only. Others of the call may have no holes."""
    model, cache = ending(family), CACHES[block_cache]
    slow = reference.Reference.of(model.config, model.params)
    shared = template(99, (), 24)
    requests = []
    for index, holes in enumerate((((24, 4), (31, 7), (40, 1)), ((30, 6), (44, 6)), ((26, 12),))):
        ids = [*shared, *template(index, holes)[24:]]
        requests.append(asked(f"r{index}", ids, holes, seed=index, **{"block_length": 5, **settings}))
    strangers = []
    if 12 % requests[0].sampling.block_size == 0:  # a response has whole blocks
        strangers = [Request(f"s{i}", (*shared, *range(60, 66 + i)), None, requests[0].sampling) for i in range(2)]
    engine = Engine(model, cache=CacheConfig(**cache), batch_size=5)
    results = {result.id: result for result in engine.generate([requests[2], *strangers, *requests[:2]])}
    told = 0
    for request in requests:
        result = results[request.id]
        wanted = reference.denoise(
            slow,
            request.prompt_ids,
            request.sampling,
            name=request.id,
            prefix_len=result.prefix_len,
            boundary=2,
            refresh_interval=cache["refresh_interval"],
            block_cache=block_cache,
            holes=request.holes,
        )
        assert result.prefix_len in (23, 24) and model.config.mask_id not in result.token_ids
        if wanted.gap > SMALLEST_GAP:
            told += 1
            assert result.token_ids == wanted.tokens, (request.id, wanted.gap)
            assert result.forward_passes == wanted.passes
    assert told
    alone = dataclasses.replace(requests[0], prefix_len=results["r0"].prefix_len)
    assert engine.generate(alone) == [results["r0"]]
    if settings.get("early_stop"):
        found = [hole.token_ids for request in requests for hole in results[request.id].holes]
        found = [hole for hole in found if len(hole) > 2]
        closed = [hole for hole in found if hole[-1] == hole[-2] in model.config.eos_ids]
        assert 0 < len(closed) < len(found)


def test_holes_that_move_compile_nothing() -> None:
    engine = Engine(load("dream"), cache=CacheConfig(boundary=2, block_cache="dual"))
    places = (((20, 4), (30, 8)), ((1, 1), (12, 9), (40, 2)), ((0, 12),))
    requests = [asked(f"{i}", template(i, holes), holes, block_length=4) for i, holes in enumerate(places)]
    engine.generate(requests[0])
    before = CompileCounter()
    for request in requests[1:]:
        (result,) = engine.generate(request)
        assert len(result.decoded) == 12 and load("dream").config.mask_id not in result.token_ids
    assert before.count == 0


@pytest.mark.full
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_functional_layer_fills_holes_too(family: str) -> None:
    model, holes = load(family), SEVERAL[0]
    ids = [template(seed, holes) for seed in range(2)]
    sampling = SamplingConfig(12, 6)
    engine = Engine(model, cache=CacheConfig(policy="none"))
    wanted = engine.generate([asked(f"{i}", row, holes, steps=6) for i, row in enumerate(ids)])
    masked = np.asarray(ids) < 0
    prefix = encode_prefix(model.params, model.config, jnp.zeros((0,), jnp.int32), boundaries=[0])
    canvas, key = jnp.asarray(np.pad(np.maximum(ids, 0), ((0, 0), (0, 3)))), jax.random.key(0)
    lengths = jnp.full((2,), LENGTH)

    def run(holes: Any) -> Any:
        return denoise(model.params, model.config, prefix, canvas, 0, sampling, key, canvas_len=lengths, holes=holes)

    found = run(jnp.asarray(np.pad(masked, ((0, 0), (0, 3)))))
    assert [tuple(map(int, row)) for row in found.tokens] == [result.decoded for result in wanted]
    wrong = jnp.asarray(np.pad(masked, ((0, 0), (0, 3)))).at[1, 0].set(True)
    with pytest.raises(ValueError, match=r"holes must have gen_length=12 places in every row, got \[12, 13\]"):
        run(wrong)
    traced = jax.jit(run)(wrong)
    assert traced.failed.tolist() == [False, True]
    np.testing.assert_array_equal(traced.tokens[0], found.tokens[0])
    with pytest.raises(ValueError, match="block-causal"):
        other = families.load("sdar")
        denoise(
            other.params,
            other.config,
            encode_prefix(other.params, other.config, jnp.zeros((0,), jnp.int32)),
            canvas,
            other.config.num_layers,
            sampling,
            key,
            holes=wrong,
        )
