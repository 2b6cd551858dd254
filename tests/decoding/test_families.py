"""SDAR, LLaDA2, LLaDA-MoE and A2D as BD3LM: the tokens of their public loops, with caches and without, in company."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import (
    BicacheError,
    CacheConfig,
    Engine,
    Model,
    Request,
    SamplingConfig,
    denoise,
    encode_prefix,
    forward,
)
from bicache_jax.cli import main


def answer(model: Model, policy: str, work: Sequence[families.Case]) -> None:
    """Answers all cases in one call, in another order, and compares."""
    found = Engine(model, cache=CacheConfig(policy=policy)).generate([case.request for case in work][::-1])
    for case, result in zip(work[::-1], found, strict=True):
        assert case.agrees(result.token_ids), (policy, case.request.id)
        if "stop" not in case.name and "eos" not in case.name:  # asked for to the end here
            assert result.forward_passes <= case.nfe, (policy, case.request.id)


@pytest.mark.parametrize(
    ("name", "suffix", "block"),
    [("sdar", "_b4", 4), ("sdar", "_b8", 8), ("llada2", "_b4", 4), ("llada2", "_b8", 8), ("llada-moe", "", None)],
)
def test_logits_are_those_of_the_public_models(name: str, suffix: str, block: int | None) -> None:
    model, arrays = families.load(name), families.arrays(name)
    ids = jnp.asarray(arrays["forward_ids"])
    logits = forward(model.params, model.config, ids, block_length=block)
    np.testing.assert_allclose(logits, arrays[f"forward_logits{suffix}"], atol=3e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdar", pytest.param("llada2", marks=pytest.mark.full)])
def test_kept_blocks_change_no_token(name: str) -> None:
    work = list(families.cases(name))
    answer(families.load(name), "exact", work)
    if name == "sdar":
        answer(families.load(name), "none", work[:1])


@pytest.mark.full
@pytest.mark.parametrize("name", ["sdar", "llada2"])
def test_without_caches_the_tokens_are_the_same(name: str) -> None:
    answer(families.load(name), "none", list(families.cases(name)))


@pytest.mark.full
@pytest.mark.parametrize("shifted", [False, True])
def test_without_caches_behind_a_padded_prompt_too(*, shifted: bool) -> None:
    answer(bd3lm(shifted=shifted)[0], "none", bd3lm(shifted=shifted)[1])


@pytest.mark.slow
def test_a_mixture_of_experts_decoded_as_llada() -> None:
    answer(families.load("llada-moe"), "none", list(families.cases("llada-moe")))


def bd3lm(*, shifted: bool) -> tuple[Model, list[families.Case]]:
    model = families.load("a2d-qwen3", block_causal=True, right_shift_logits=shifted)
    # No file of the checkpoint names the token with which its sampler pads, and which it then does not see.
    pad = families.recorded("a2d-qwen3")["pad_token_id"]
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, pad_id=pad))
    return model, list(families.cases("a2d-qwen3", sampler="bd3lm", right_shift_logits=shifted or None))


@pytest.mark.slow
@pytest.mark.parametrize("shifted", [pytest.param(False, marks=pytest.mark.full), True])
def test_blocks_behind_a_padded_prompt(*, shifted: bool) -> None:
    model, work = bd3lm(shifted=shifted)
    assert len(work) == (1 if shifted else 7)
    answer(model, "exact", work)


@pytest.mark.slow
def test_a_prefix_of_whole_blocks_changes_no_token() -> None:
    """However long the prefix that is asked for, what is kept of it ends with a block; blocks differ in the cache."""
    for model, case, kept in (
        (families.load("sdar"), next(families.cases("sdar")), [12, 8, 0]),
        (bd3lm(shifted=False)[0], bd3lm(shifted=False)[1][0], [13, 5, 0]),
    ):
        requests = [
            dataclasses.replace(case.request, id=f"{length}", prefix_len=length, index=place)
            for place, length in enumerate((len(case.request.prompt_ids), 11, 3))
        ]
        found = Engine(model).generate(requests)
        assert [result.prefix_len for result in found] == kept
        assert all(case.agrees(result.token_ids) for result in found)


@pytest.mark.slow
def test_a_row_ends_with_the_block_that_ends_its_text() -> None:
    for name, stops in (("sdar", "stop"), ("a2d-qwen3", "eos")):
        model = families.load(name) if name == "sdar" else bd3lm(shifted=False)[0]
        for case in (case for case in families.cases(name) if stops in case.name):
            ends = case.facts["stop"] if name == "sdar" else [case.facts["eos_token_id"]]
            config = dataclasses.replace(model.config, eos_ids=tuple(ends))
            request = dataclasses.replace(
                case.request, sampling=dataclasses.replace(case.request.sampling, early_stop=True)
            )
            [result] = Engine(dataclasses.replace(model, config=config)).generate(request)
            assert case.agrees(result.token_ids) and set(result.token_ids[len(case.tokens) :]) <= set(ends)
            assert result.forward_passes <= case.nfe and result.finish_reason == "stop"


@pytest.mark.slow
def test_the_functional_layer_gives_them_too() -> None:
    model = families.load("sdar")
    case = next(families.cases("sdar"))
    sampling, prompt = case.request.sampling, case.request.prompt_ids
    prefix = encode_prefix(model.params, model.config, jnp.asarray(prompt[:8]), block_length=sampling.block_length)
    canvas = jnp.asarray([[*prompt[8:], *[0] * sampling.gen_length]])
    key = jnp.zeros(2, jnp.uint32)
    found = denoise(model.params, model.config, prefix, canvas, model.config.num_layers, sampling, key)
    assert case.agrees(tuple(found.tokens[0].tolist()))


def numpy_edits(model: Model, prompt: Sequence[int], sampling: SamplingConfig) -> tuple[list[int], int]:
    """LLaDA2.1's loop over whole sequences, with the model's logits: tokens of the response, forward passes."""
    block, mask, edit = sampling.block_size, model.config.mask_id, sampling.editing_threshold or 1.0
    run = jax.jit(lambda ids: forward(model.params, model.config, ids, block_length=block))
    end = -(-(len(prompt) + sampling.gen_length) // block) * block
    canvas, passes = np.asarray([*prompt, *[mask] * (end - len(prompt))]), 0
    for start in range(len(prompt) // block * block, end, block):
        inside, without = slice(start, start + block), 0
        for step in range(10_000):
            masked = canvas[inside] == mask
            without += not masked.any()
            if without > 16:
                break
            logits = np.array(run(jnp.asarray(canvas[None]))[0])
            passes += 1
            p = np.exp(logits[inside] - logits[inside].max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            p[:, mask] = -1
            token, sure = p.argmax(-1), p.max(-1)
            least = block // sampling.block_steps + (step < block % sampling.block_steps)
            chosen = masked & (sure > (sampling.threshold or 1))
            if chosen.sum() < least:
                ranked = np.argsort(np.where(masked, -sure, np.inf), kind="stable")
                chosen = np.isin(np.arange(block), ranked[:least]) & masked
            placed = ~masked & (np.arange(start, start + block) >= len(prompt))
            edited = placed & (token != canvas[inside]) & (sure > edit)
            canvas[inside] = np.where(chosen | edited, token, canvas[inside])
            if not masked.any() and not edited.any():
                break
    return canvas[len(prompt) : len(prompt) + sampling.gen_length].tolist(), passes


@pytest.mark.slow
def test_placed_tokens_are_edited_as_a_plain_loop_does() -> None:
    model = families.load("llada2")
    prompt = tuple(map(int, families.arrays("llada2")["prompt_0"]))
    sampling = SamplingConfig(20, block_length=8, steps_per_block=3, threshold=0.5, editing_threshold=0.15)
    wanted, passes = numpy_edits(model, prompt, sampling)
    plain = Engine(model).generate([prompt], sampling=dataclasses.replace(sampling, editing_threshold=None))[0]
    [result] = Engine(model).generate([prompt], sampling=sampling)
    assert list(result.token_ids) == wanted and result.forward_passes == passes
    assert list(plain.token_ids) != wanted  # something was edited


def test_what_does_not_go_with_such_attention_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sdar, moe = families.load("sdar"), families.load("llada-moe")
    for cache in (CacheConfig(policy="bicache"), CacheConfig(boundary=2)):
        with pytest.raises(BicacheError, match="block-causal: its caches are exact"):
            Engine(sdar, cache=cache)
    with pytest.raises(BicacheError, match="policy exact keeps its blocks"):
        Engine(sdar, cache=CacheConfig(block_cache="dual"))
    with pytest.raises(BicacheError, match="policy 'exact' is for block-causal"):
        Engine(moe, cache=CacheConfig(policy="exact"))
    with pytest.raises(BicacheError, match="editing_threshold is for block-causal"):
        Engine(moe, cache=CacheConfig(policy="none")).generate([[1, 2]], sampling={"editing_threshold": 0.9})
    with pytest.raises(ValueError, match="steps_per_block and steps say the same"):
        SamplingConfig(32, 8, steps_per_block=4)
    (tmp_path / "in.jsonl").write_text('{"prompt_ids": [1, 2, 3]}\n')
    flags = ["--model", str(families.FOLDERS["llada-moe"]), "--mask-id", "245", "--block-causal"]
    flags += ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", *flags]) == 2
    assert "have full attention: leave block-causal out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_answers(tmp_path: Path) -> None:
    case = next(case for case in families.cases("llada2") if case.name == "dynamic_P1_g32_b16_s16_t0.3")
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt_ids": case.request.prompt_ids}) + "\n")
    flags = ["--model", str(families.FOLDERS["llada2"]), "--mask-id", "245", "--gen-length", "32", "--quiet"]
    flags += ["--block-length", "16", "--steps-per-block", "16", "--threshold", "0.3", "--no-compilation-cache"]
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", *flags, *files]) == 0
    result = json.loads((tmp_path / "out.jsonl").read_text())
    assert case.agrees(tuple(result["token_ids"])) and result["boundary"] == 3


@pytest.mark.slow
def test_a_mesh_changes_no_token() -> None:
    """Rows over two data shards; heads cut in two, and the experts, each of them or their set."""
    child = Path(__file__).parents[1] / "families_child.py"
    done = subprocess.run([sys.executable, str(child)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5


@pytest.mark.slow
def test_a_longer_prompt_finds_the_blocks_of_a_shorter_one() -> None:
    """Blocks have the same keys and values whatever follows: only what is behind what is known gets encoded."""
    model, settings = families.load("sdar"), SamplingConfig(8, steps_per_block=2)
    engine = Engine(model, sampling=settings)
    text = tuple(map(int, np.random.default_rng(0).integers(1, 250, 90)))
    asked = [Request(f"{length}", text[:length], length) for length in (40, 63, 86, 61)]
    found = [engine.generate(request)[0] for request in asked]
    assert [result.prefix_len for result in found] == [40, 60, 84, 60]
    assert [result.cached_tokens for result in found] == [0, 40, 60, 60]
    other = engine.generate(Request("61", (9, *text[1:61]), 61), namespace="other")[0]
    assert other.cached_tokens == 0  # neither these tokens nor this namespace
    plain = Engine(model, cache=CacheConfig(policy="none"), sampling=settings).generate(asked)
    assert [result.token_ids for result in plain] == [result.token_ids for result in found]


@pytest.mark.slow
def test_whole_blocks_of_an_added_prefix_are_kept() -> None:
    engine = Engine(families.load("sdar"), sampling=SamplingConfig(8, steps_per_block=2), prefix_cache_bytes=0)
    text = list(range(1, 31))  # 28 tokens are whole blocks
    assert engine.prefixes.add(text) == 30 and text not in engine.prefixes
    first, second = (engine.generate([[*text, token]])[0] for token in (40, 41))
    assert (first.prefix_len, first.cached_tokens, second.cached_tokens) == (28, 0, 28) and text in engine.prefixes
    engine.prefixes.drop(text)
    assert text not in engine.prefixes
