"""A program that uses the library, checked by mypy --strict and pyright as its users' programs are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import assert_type

import jax
import jax.numpy as jnp

import bicache_jax
from bicache_jax import (
    AsyncEngine,
    BicacheError,
    CacheConfig,
    Denoised,
    Engine,
    Family,
    Model,
    ModelConfig,
    PrefixCache,
    Request,
    Result,
    SamplingConfig,
    denoise,
    encode_prefix,
    forward,
    load_model,
    register_family,
    use_compilation_cache,
)
from bicache_jax.core.backbone import Backbone, MakeBackbone
from bicache_jax.testing import Fault, backbone_faults, check_backbone


def answer(model: Model, questions: list[str]) -> dict[str, str]:
    """Answers questions, in the order in which they finish."""
    engine = Engine(
        model,
        cache=CacheConfig(policy="bicache", boundary=2, refresh_interval="auto", block_cache="dual"),
        sampling=SamplingConfig(gen_length=8, steps=4, block_length=4, temperature=0.5, remasking="low_confidence"),
        batch_size=8,
        prefix_cache_bytes=1 << 20,
    )
    assert_type(engine.generate(questions), list[Result])
    assert_type(engine.chat([{"role": "user", "content": "where does Mara live"}]), Result)
    assert_type(engine.stream(questions, errors="return"), Iterator[Result])
    several: list[str | dict[str, object] | list[int] | Request]
    several = [*questions, {"prompt": "x", "n": 2}, [1, 2, 3], Request("a", (1, 2))]
    mixed = engine.generate(several, errors="return", namespace="one")
    found: dict[str, str] = {}
    for result in [*engine.stream(questions, partial=True, every=2), *mixed]:
        if result.error is not None:
            raise BicacheError(result.error)
        if result.finish_reason in ("stop", "length") and result.text is not None:
            found[result.id] = result.text
        assert_type(result.token_ids, tuple[int, ...])
        assert_type(result.prefix_len + result.boundary + result.cached_tokens, int)
    assert_type(engine.model, Model)
    assert_type(engine.cache, CacheConfig)
    assert_type(engine.stats.prefixes_encoded, int)
    assert_type(engine.stats.seconds, float)
    assert_type(engine.warmup(prompt_len=32, rows=2).seconds, float)
    assert_type(engine.prefixes.add("a document"), int)
    engine.update_params(jax.tree.map(lambda leaf: leaf * 2, model.params))
    return found


async def serve(engine: Engine) -> list[str | None]:
    """Answers many at a time."""
    async with AsyncEngine(engine, max_queue=4, shadow=0.01) as server:
        first: Result = (await server.generate("where does Mara live", priority=1, timeout=2.0))[0]
        seen = [result.text async for result in server.stream("who drinks tea")]
    return [first.text, *seen]


def functional(model: Model) -> jax.Array:
    """The functional layer under jit."""
    ids = jnp.zeros((4,), jnp.int32)
    sampling = SamplingConfig(gen_length=2)

    @jax.jit
    def run(params: object, ids: jax.Array, canvas: jax.Array, key: jax.Array) -> jax.Array:
        prefix = encode_prefix(params, model.config, ids, boundaries=[1])
        assert_type(prefix, PrefixCache)
        done = denoise(params, model.config, prefix, canvas, 1, sampling, key, block_cache="off")
        assert_type(done, Denoised)
        return done.tokens

    logits = forward(model.params, model.config, ids[None])
    assert_type(logits, jax.Array)
    tokens: jax.Array = run(model.params, ids, jnp.zeros((1, 3), jnp.int32), jax.random.key(0))
    return tokens + jnp.argmax(logits)


def own(config: ModelConfig, made: Backbone, make: MakeBackbone, params: object) -> list[Fault]:
    """An architecture of one's own."""

    def init(config: ModelConfig, key: jax.Array, dtype: object) -> dict[str, jax.Array]:
        return {"layers": jnp.zeros((config.num_layers,))}

    assert_type(register_family(Family("own", make, init)), Family)
    check_backbone(made, params)
    assert_type(Model(config, params, backbone=make).config.num_layers, int)
    return backbone_faults(made, params, tolerance=1e-3)


def main() -> None:
    """Runs everything but an architecture of one's own."""
    use_compilation_cache(False)
    model = load_model("example", dtype="float32", quantize=None)
    assert_type(model, Model)
    assert_type(model.config.eos_ids, tuple[int, ...])
    if model.tokenizer is not None:
        assert_type(model.tokenizer.encode("hello"), tuple[int, ...])
    print(bicache_jax.__version__, answer(model, ["which town does Mara live in"]))
    print(asyncio.run(serve(Engine(model))), functional(model).shape)


if __name__ == "__main__":
    main()
