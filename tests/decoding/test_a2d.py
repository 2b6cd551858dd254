"""A2D: tokens of its published MDLM sampler, alone and in one batch, and what a checkpoint must say."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import golden
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import BicacheError, CacheConfig, Engine, Model, Request, SamplingConfig, forward, load_model
from bicache_jax.cli import main
from bicache_jax.decoding.schedule import linear_counts

FOLDER = golden.DATA / "a2d-qwen3"
CASES = json.loads((FOLDER / "cases.json").read_text())
MASK = CASES["mask_token_id"]
# Blocks of one length, and as many steps for each, are what a `SamplingConfig` can say.
NAMES = [
    "mdlm_g32_b32_s32",
    "mdlm_g32_b8_s16",
    "mdlm_g32_b8_s10",
    "mdlm_g24_b12_s24_batch3_unequal",
    "mdlm_shift_g24_b8_s12",
    "mdlm_shift_batch2_unequal",
    "mdlm_cfg_g16_b8_s8",
]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(FOLDER, mask_id=MASK)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "expected.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def case(name: str) -> dict[str, Any]:
    return CASES["cases"][name] if "cases" in CASES else CASES[name]


def asked(name: str, expected: dict[str, np.ndarray]) -> dict[str, tuple[Request, tuple[int, ...]]]:
    """A case's requests and what they are to be answered, by id."""
    facts, found = case(name), {}
    blocks = facts["max_new_tokens"] // facts["block_size"]
    sampling = SamplingConfig(
        facts["max_new_tokens"],
        -(-facts["steps"] // blocks) * blocks,
        facts["block_size"],
        cfg_scale=facts.get("cfg_scale", 0.0),
    )
    for row, number in enumerate(facts["prompts"]):
        prompt = tuple(map(int, expected[f"prompt_{number}"]))
        tokens = expected[name][row, len(prompt) : len(prompt) + facts["max_new_tokens"]]
        found[f"{name}/{row}"] = Request(f"{name}/{row}", prompt, sampling=sampling), tuple(map(int, tokens))
    return found


def test_logits_are_those_of_the_published_model(model: Model, expected: dict[str, np.ndarray]) -> None:
    valid = expected["forward_attention_mask"].astype(bool)
    logits = forward(model.params, model.config, jnp.asarray(expected["forward_ids"]), valid=jnp.asarray(valid))
    np.testing.assert_allclose(np.asarray(logits)[valid], expected["forward_logits"][valid], atol=3e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("shifted", [pytest.param(False, marks=pytest.mark.full), True])
def test_tokens_are_those_of_the_published_loop(
    model: Model, expected: dict[str, np.ndarray], *, shifted: bool
) -> None:
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, shift_logits=shifted))
    work: dict[str, tuple[Request, tuple[int, ...]]] = {}
    for name in NAMES:
        if bool(case(name).get("right_shift_logits")) == shifted:
            work |= asked(name, expected)
    requests = [request for request, _ in work.values()]
    together = Engine(model, cache=CacheConfig(policy="none")).generate(requests[::-1])
    exact = Engine(model, cache=CacheConfig(boundary=0, refresh_interval=1, prefix_detection="off"))
    alone = [exact.generate(dataclasses.replace(request, prefix_len=4))[0] for request in requests[:3]]
    assert len(together) == len(work) >= 3
    for result in [*together, *alone]:
        assert result.token_ids == work[result.id][1], result.id
        assert result.forward_passes <= case(result.id.split("/")[0])["nfe"]


def test_steps_take_their_share_of_what_is_left() -> None:
    assert linear_counts(8, 4).tolist() == [2, 2, 2, 2]
    assert linear_counts(8, 3).tolist() == [3, 2, 3]  # 5 / 2 rounds to the even number
    assert linear_counts(2, 5).tolist() == [1, 1]  # 2 / 5 rounds to none
    for masks, steps in ((32, 7), (5, 5), (1, 9), (100, 33)):
        counts = linear_counts(masks, steps)
        assert counts.sum() == masks and len(counts) <= steps and (counts > 0).all()


@pytest.mark.slow
def test_the_command_answers(tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    prompt = list(map(int, expected["prompt_0"]))
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt_ids": prompt}) + "\n")
    flags = ["--model", str(FOLDER), "--mask-id", str(MASK), "--policy", "none", "--gen-length", "32", "--quiet"]
    flags += ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--no-compilation-cache"]
    assert main(["generate", *flags]) == 0
    result = json.loads((tmp_path / "out.jsonl").read_text())
    assert result["token_ids"] == expected["mdlm_g32_b32_s32"][0, len(prompt) :].tolist()


def test_what_names_the_mask_token(tmp_path: Path) -> None:
    with pytest.raises(BicacheError, match="nothing here names the mask token.*--mask-id"):
        load_model(FOLDER)
    folder = tmp_path / "named"
    shutil.copytree(FOLDER, folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "mask_token_id": 5}))
    assert load_model(folder).config.mask_id == 5
    with pytest.raises(BicacheError, match="rescaled rotary"):
        (folder / "config.json").write_text(json.dumps({**fields, "rope_scaling": {"type": "yarn", "factor": 4.0}}))
        load_model(folder, mask_id=5)
