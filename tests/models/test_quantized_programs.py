"""What compilers make of 8-bit weights: integers are multiplied, and weights stay integers in memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from loops import copies

from bicache_jax import forward
from bicache_jax.configs import model_shape
from bicache_jax.core.config import ModelConfig
from bicache_jax.models import abstract
from scripts import compile_kernels

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: libtpu is not installed"
)
# Each weight of the MLP is 1 MiB in 8 bits; no activation has as many numbers as a weight.
SIZES: dict[str, int] = {
    "d_model": 512,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 128,
    "d_mlp": 2048,
    "num_layers": 3,
    "vocab_size": 1024,
    "mask_id": 1023,
}
SMALLEST = 512 * 512
PER_LAYER = 7  # q, k, v, o, gate, up, down


def model(quantize: Any) -> ModelConfig:
    return dataclasses.replace(model_shape("small"), quantize=quantize, **SIZES)


def lowered(quantize: Any, sharding: Any) -> Any:
    """A pass over two rows of 192 tokens: every product with a weight once."""

    def here(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    config = model(quantize)
    run = jax.jit(lambda params, ids: forward(params, config, ids))
    ids = jax.ShapeDtypeStruct((2, 192), jnp.int32, sharding=sharding)
    return run.lower(jax.tree.map(here, abstract(config, jnp.bfloat16)), ids)


def products(hlo: str) -> Counter[tuple[str, str, str]]:
    """Products of a program for TPUs, by the types of both operands and of the sums; kernels' own are left out."""
    types = dict(re.findall(r"^\s+(?:ROOT )?%([\w.\-]+) = (\w+)\[", hlo, re.MULTILINE))
    found = re.findall(r" = (\w+)\[[^=]*? (?:convolution|dot)\(%([\w.\-]+), %([\w.\-]+)\)", hlo)
    return Counter((types[left], types[right], out) for out, left, right in found)


def check(quantize: str, compiled: Any) -> None:
    """No weight is there as floats, as its products need it."""
    assert not list(copies(compiled.as_text())), "a copy of 1 MiB in a loop"
    found = products(compiled.as_text())
    integers = {types: count for types, count in found.items() if types[:2] == ("s8", "s8")}
    if quantize == "w8":
        assert not integers
        return
    assert set(integers) == {("s8", "s8", "s32")} and sum(integers.values()) % PER_LAYER == 1  # and the head
    turned = sum(count for types, count in found.items() if types not in integers)
    assert turned == 2 * (sum(integers.values()) // PER_LAYER)  # queries and keys, by the rotary embedding


@needs_compiler
@pytest.mark.parametrize("quantize", ["w8", "w8a8"])
def test_a_pass_on_tpus(quantize: str) -> None:
    sharding = jax.sharding.SingleDeviceSharding(compile_kernels.device("v5e"))
    compiled = lowered(quantize, sharding).compile()
    check(quantize, compiled)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * SMALLEST, "room for the smallest weight in bfloat16"


@pytest.mark.full
@needs_compiler
@pytest.mark.parametrize("quantize", ["w8", "w8a8"])
def test_the_decode_program_on_tpus(quantize: Any) -> None:
    lowered = compile_kernels.lower_program("v5e", shape="small", quantize=quantize, layers=3, **without_layers())
    compiled = lowered.compile()
    check(quantize, compiled)
    stack = 2 * 3 * SMALLEST  # of the smallest weight in bfloat16
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * stack, "of these there are four, and larger ones"


def without_layers() -> dict[str, int]:
    return {name: size for name, size in SIZES.items() if name != "num_layers"}


def test_a_pass_on_gpus() -> None:
    """As it is lowered for CUDA; what its compiler makes of that is not known here."""
    config = model("w8a8")
    run = jax.jit(lambda params, ids: forward(params, config, ids, attention="xla"))
    shapes = abstract(config, jnp.bfloat16), jax.ShapeDtypeStruct((2, 192), jnp.int32)
    text = jax.export.export(run, platforms=["cuda"])(*shapes).mlir_module()
    found = Counter(re.findall(r"dot_general .*: \(tensor<\w*x(\w+)>, tensor<\w*x(\w+)>\) -> tensor<\w*x(\w+)>", text))
    assert found.pop(("i8", "i8", "i32")) == PER_LAYER + 1
    assert set(found) == {("bf16", "bf16", "f32")}  # attention
