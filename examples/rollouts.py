"""Reinforcement learning: an engine samples, a rule scores, an update changes the weights, and the engine goes on.

    pip install 'bicache-jax[train]'
    python examples/rollouts.py

Each round draws new questions about new documents, asks the engine for several responses to each (`n`, temperature 1;
the whole prompt is then a prefix that they share, encoded once), and scores a response with 1 if it answers the
question and 0 if it does not. The update is a policy gradient: some of a response's tokens are masked again at random,
and the log-probability that the model gives them (`forward`, which has a gradient) is weighted by how much better the
response did than the other responses to its prompt. `Engine.update_params` then exchanges the weights. It compiles
nothing, since weights are arguments of the compiled programs, and forgets the prefixes that the old weights encoded.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from bicache_jax import CacheConfig, Engine, ModelConfig, Result, SamplingConfig, forward, load_model
from bicache_jax.example import task

LENGTH, RESPONSE = 72, 8
"""Tokens of a row of the update, padding included, and those of a response."""


@dataclasses.dataclass(frozen=True)
class Round:
    """What a round did.

    Attributes:
        reward: mean over its responses.
        loss: of the update.
        compilations: programs compiled by sampling and update.
        encoded: prefixes encoded.
        sampling_s: seconds that sampling took.
        update_s: seconds that the update took.
    """

    reward: float
    loss: float
    compilations: int
    encoded: int
    sampling_s: float
    update_s: float


def prompts(seed: int, count: int, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Questions of some kinds about documents of one size, so that every round has the shapes of the first one."""
    drawn = task.draw_requests(seed, 1000 * count, people=(6, 6), facts=(2, 2))
    asked = itertools.islice((one for one in drawn if one["kind"] in kinds), count)
    return [{name: one[name] for name in ("id", "prompt", "answer")} for one in asked]


def rule(result: Result, answer: str | list[str]) -> float:
    """The reward: 1 for a right answer, in any order where it is a list."""
    return float(result.text is not None and result.text.strip() in ([answer] if isinstance(answer, str) else answer))


def sampled(engine: Engine, asked: Sequence[dict[str, Any]], samples: int) -> tuple[list[Result], np.ndarray]:
    """Several responses to each prompt, and their rewards [prompts, samples]."""
    results = engine.generate([{"id": one["id"], "prompt": one["prompt"], "n": samples} for one in asked])
    rewards = [rule(result, asked[row // samples]["answer"]) for row, result in enumerate(results)]
    return results, np.asarray(rewards).reshape(len(asked), samples)


def advantages(rewards: np.ndarray) -> np.ndarray:
    """How much better a response is than the others to its prompt, [prompts, samples]."""
    return rewards - rewards.mean(axis=1, keepdims=True)


def make_update(
    config: ModelConfig, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Any, optax.OptState, Array]]:
    """The compiled update: `(params, state, ids [B, S], targets [B, S], weights [B, S], valid [B, S])`."""

    def loss_of(params: Any, ids: Array, targets: Array, weights: Array, valid: Array) -> Array:
        log_p = jax.nn.log_softmax(forward(params, config, ids, valid=valid))
        picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * weights) / ids.shape[0]

    @jax.jit
    def update(params: Any, state: optax.OptState, *batch: Array) -> tuple[Any, optax.OptState, Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, *batch)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, loss

    return update


def masked_batch(
    rng: np.random.Generator, asked: Sequence[Sequence[int]], results: Sequence[Result], gains: np.ndarray, mask: int
) -> tuple[np.ndarray, ...]:
    """Prompts with their responses, of which a random share is masked: ids, targets, weights and what is no padding.

    A masked token has the weight of its response, divided by the number of tokens that are masked in it.
    """
    shape = (len(results), LENGTH)
    targets, valid, hidden = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (prompt, result) in enumerate(zip(asked, results, strict=True)):
        tokens = [*prompt, *result.token_ids]
        targets[row, : len(tokens)], valid[row, : len(tokens)] = tokens, True
        chosen = rng.permutation(RESPONSE)[: rng.integers(1, RESPONSE + 1)]
        hidden[row, len(prompt) + chosen] = True
    weights = hidden * (gains.ravel() / hidden.sum(axis=1))[:, None]
    return np.where(hidden, mask, targets), targets, weights.astype(np.float32), valid


def train(
    engine: Engine, *, rounds: int, count: int, samples: int, rate: float, kinds: Sequence[str], seed: int
) -> Iterator[Round]:
    """Rounds of sampling, scoring and updating; the engine has the new weights after each."""
    model = engine.model
    assert model.tokenizer is not None
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    update, state = make_update(model.config, optimizer), jax.jit(optimizer.init)(model.params)
    for number in range(rounds):
        begun, before = time.perf_counter(), engine.stats
        asked = prompts(seed + number, count, kinds)
        results, rewards = sampled(engine, asked, samples)
        done = time.perf_counter()
        texts = [model.tokenizer.encode(one["prompt"]) for one in asked for _ in range(samples)]
        rng = np.random.default_rng([seed, number])
        batch = masked_batch(rng, texts, results, advantages(rewards), model.config.mask_id)
        params, state, loss = update(engine.model.params, state, *batch)
        engine.update_params(params)
        yield Round(
            reward=float(rewards.mean()),
            loss=float(loss),
            compilations=engine.stats.compilations - before.compilations,
            encoded=engine.stats.prefixes_encoded - before.prefixes_encoded,
            sampling_s=done - begun,
            update_s=time.perf_counter() - done,
        )


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description="Trains the bundled model on its own samples.")
    parser.add_argument("--rounds", type=int, default=12, help="rounds (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a round (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="responses to each (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--kinds", default="list", help="kinds of questions (default: %(default)s)")
    parser.add_argument(
        "--held-out", type=int, default=4, help="times --prompts that are asked before and after (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=task.FIRST_HELD_OUT, help="of questions (default: %(default)s)")
    args = parser.parse_args()
    engine = Engine(
        load_model("example", dtype="float32"),
        cache=CacheConfig(policy="bicache"),
        sampling=SamplingConfig(gen_length=RESPONSE, temperature=1.0),
    )
    kinds = args.kinds.split(",")
    sets = [prompts(args.seed + 1_000_000 + number, args.prompts, kinds) for number in range(args.held_out)]

    def held_out() -> np.ndarray:
        """The mean reward of each prompt that is not trained on."""
        return np.concatenate([sampled(engine, asked, args.samples)[1].mean(axis=1) for asked in sets])

    before = held_out() if sets else np.zeros(0)
    print("round  reward  loss     compiled  encoded  sampling  update")
    done = train(
        engine,
        rounds=args.rounds,
        count=args.prompts,
        samples=args.samples,
        rate=args.rate,
        kinds=kinds,
        seed=args.seed,
    )
    for number, one in enumerate(done, start=1):
        print(
            f"{number:5}  {one.reward:6.3f}  {one.loss:7.4f}  {one.compilations:8}  {one.encoded:7}"
            f"  {one.sampling_s:6.1f} s  {one.update_s:4.1f} s",
            flush=True,
        )
    if sets:
        gain = held_out() - before
        error = gain.std(ddof=1) / len(gain) ** 0.5
        print(
            f"{len(gain)} prompts held out: reward {before.mean():.3f} before, {(before + gain).mean():.3f} after,",
            end="",
        )
        print(f" difference {gain.mean():+.3f} +- {error:.3f} (standard error over prompts)")


if __name__ == "__main__":
    main()
