"""Golden cases of the families beyond LLaDA and Dream, as requests and the tokens that they are to be answered with."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

import golden
import numpy as np

from bicache_jax import Model, Request, SamplingConfig, load_model


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a golden case.

    Attributes:
        name: of the case.
        request: what is asked.
        tokens: what the public loop answers; fewer than asked for where it stops.
        nfe: forward passes that it makes.
        facts: the case as recorded.
    """

    name: str
    request: Request
    tokens: tuple[int, ...]
    nfe: int
    facts: dict[str, Any]

    def agrees(self, tokens: tuple[int, ...]) -> bool:
        """Whether these are the recorded tokens, as far as there are any."""
        return tokens[: len(self.tokens)] == self.tokens


FOLDERS = {name: golden.DATA / name for name in ("a2d-qwen3", "sdar", "llada-moe", "llada2")}


@functools.cache
def recorded(name: str) -> dict[str, Any]:
    """`cases.json` of a folder."""
    found: dict[str, Any] = json.loads((FOLDERS[name] / "cases.json").read_text())
    return found


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """`expected.npz` of a folder."""
    with np.load(FOLDERS[name] / "expected.npz", allow_pickle=False) as found:
        return dict(found)


@functools.cache
def load(name: str, **facts: bool) -> Model:
    """A golden checkpoint; `facts` are what its files do not say."""
    return load_model(FOLDERS[name], mask_id=recorded(name)["mask_token_id"], **facts)


def _prompts(name: str, facts: dict[str, Any]) -> list[tuple[int, ...]]:
    numbers = facts.get("prompts", [facts.get("prompt")])
    return [tuple(map(int, arrays(name)[f"prompt_{number}"])) for number in numbers]


def _sampling(facts: dict[str, Any]) -> SamplingConfig:
    rule = "sequential" if facts.get("remasking_strategy") == "sequential" else None
    threshold = facts.get("confidence_threshold", facts.get("threshold"))
    return SamplingConfig(
        facts.get("gen_length", facts.get("max_new_tokens")),
        facts.get("steps"),
        facts.get("block_length", facts.get("block_size")),
        steps_per_block=facts.get("steps_per_block", facts.get("denoising_steps")),
        threshold=threshold,
        remasking=rule,
        cfg_scale=facts.get("cfg_scale", 0.0),
        suppress_tokens=tuple(facts.get("suppress_tokens", ())),
    )


def _response(name: str, case: str, row: int, prompt_len: int) -> np.ndarray:
    """The part of a recorded canvas that answers a prompt."""
    facts, canvas = recorded(name)["cases"][case], arrays(name)[case][row]
    length, block = _sampling(facts).gen_length, _sampling(facts).block_size
    if facts.get("sampler") == "bd3lm":  # prompts end where a block does, padded on their left
        longest = max(map(len, _prompts(name, facts)))
        start = -(-longest // block) * block
    elif facts.get("padding"):
        start = len(canvas) - length
    else:
        start = prompt_len
    return canvas[start : start + length]


def cases(name: str, **wanted: Any) -> Iterator[Case]:
    """The rows of a folder's cases whose facts are as wanted; a fact that is not recorded counts as None."""
    mask = recorded(name)["mask_token_id"]
    for case, facts in recorded(name)["cases"].items():
        if any((facts.get(key) or None) != value for key, value in wanted.items()):
            continue
        for row, prompt in enumerate(_prompts(name, facts)):
            tokens = [int(token) for token in _response(name, case, row, len(prompt))]
            tokens = tokens[: tokens.index(mask)] if mask in tokens else tokens
            request = Request(f"{case}/{row}", prompt, sampling=_sampling(facts))
            yield Case(case, request, tuple(tokens), facts["nfe"], facts)
