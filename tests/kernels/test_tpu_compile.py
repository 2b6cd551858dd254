"""The real TPU compiler, no TPU needed: kernels fit into VMEM, and layer loops copy neither weights nor caches."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from loops import copies, taken_out

from bicache_jax.kernels import prefix_attention
from scripts import compile_kernels

pytest.importorskip("libtpu")

MIB = 1 << 20
FULL = (pytest.mark.slow, pytest.mark.full)
OTHERS = [pytest.param(name, marks=FULL) for name in compile_kernels.TOPOLOGIES if name != "v5e"]


@pytest.mark.parametrize("topology", ["v5e", *OTHERS])
@pytest.mark.parametrize("shape", compile_kernels.KERNEL_SHAPES, ids=lambda shape: f"{shape[0]} {shape[4]}")
def test_the_kernel_fits_into_vmem(topology: str, shape: Any) -> None:
    found = compile_kernels.kernel(topology, *shape[1:])
    assert 0 < found["vmem_bytes"] <= found["vmem_limit_bytes"]
    assert found["temp_bytes"] < MIB, "nothing large is re-laid in front of the kernel"


def test_a_stack_of_prefixes_stays_where_it_is() -> None:
    """Where it fits into vector memory beside the weights, the compiler would bring all of it there for every layer."""
    sharding = jax.sharding.SingleDeviceSharding(compile_kernels.device("v5e"))
    shapes = [(8, 8, 512, 128), *[(16, 1, 8, 1024, 128)] * 2, *[(8, 8, 512, 128)] * 2]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]

    def run(*arrays: jax.Array) -> jax.Array:
        valid = jnp.ones((8, 512), bool)
        named = {"prefix_index": jnp.zeros(8, jnp.int32), "prefix_len": jnp.full((1,), 1024), "suffix_valid": valid}
        return prefix_attention(*arrays, **named, layer=3, implementation="pallas_tpu")

    text = jax.jit(run).lower(*arrays).compile().as_text()
    (call,) = (line for line in text.splitlines() if "tpu_custom_call" in line)
    held = re.findall(r'"operand_index":"\d+","color":"0"', call)
    assert len(held) >= 2, "both stacks, whose color is that of HBM"


def test_the_search_finds_copies_where_there_are_some() -> None:
    """A loop that reads weights against the grain: the compiler re-lays them."""
    sharding = jax.sharding.SingleDeviceSharding(compile_kernels.device("v5e"))
    x = jax.ShapeDtypeStruct((1, 128, 4096), jnp.bfloat16, sharding=sharding)
    w = jax.ShapeDtypeStruct((3, 4096, 4096), jnp.bfloat16, sharding=sharding)

    def layer(index: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
        weight = jax.lax.optimization_barrier(jax.lax.dynamic_index_in_dim(w, index, keepdims=False))
        weight = jax.lax.optimization_barrier(weight.reshape(4096, 32, 128).swapaxes(0, 1))
        return jnp.einsum("btd,ndh->btnh", x, weight).reshape(x.shape)

    run = jax.jit(lambda x, w: jax.lax.fori_loop(0, 3, lambda index, x: layer(index, x, w), x))
    assert 4096 * 4096 in {math.prod(shape) for _, shape in copies(run.lower(x, w).compile().as_text())}


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["auto", pytest.param("int8", marks=FULL)])
@pytest.mark.parametrize("topology", ["v5e", *(pytest.param(name, marks=FULL) for name in ("v5p", "v6e"))])
def test_layer_loops_copy_neither_weights_nor_caches(topology: str, cache_dtype: Any) -> None:
    """At LLaDA-8B's widths; activations are turned between projections and attention, which is not counted."""
    compiled = compile_kernels.lower_program(topology, cache_dtype=cache_dtype).compile()
    width, prefix = 4096, 256
    activations = {tokens * width for tokens in (128, 32, prefix + 128, prefix + 32)}
    found = {(name, shape) for name, shape in copies(compiled.as_text()) if math.prod(shape) not in activations}
    assert not found
    for kind in ("refresh", "reuse"):
        assert not taken_out(compiled.as_text(), f"/{kind}/while")
    assert "tpu_custom_call" in compiled.as_text()
    stacks = re.findall(r"(bf16|f32|s8)\[4,1,32,256,128\]", compiled.as_text())  # layers, prefixes or rows, K, P, H
    assert set(stacks) == {"bf16" if cache_dtype == "auto" else "s8"}, "in 8 bits there is none of floats"
    params = 2 * 4 * 4096 * (4 * 4096 + 3 * 12288)
    assert compiled.memory_analysis().temp_size_in_bytes < params / 4, "no copy of the stacked weights in front of it"


@pytest.mark.slow
@pytest.mark.full
def test_layer_loops_write_a_block_cache_in_place() -> None:
    """Two rows, whose blocks may stand at different places: as it is read and written, no layer of it is re-laid."""
    rows, width, prefix, suffix = 2, 4096, 256, 128
    compiled = compile_kernels.lower_program("v5e", rows=rows, block_cache="dual").compile()
    activations = {rows * tokens * width for tokens in (suffix, suffix // 2, prefix + suffix, prefix + suffix // 2)}
    activations.add(prefix * width)  # the prefix's queries in the boundary's layer
    layer = (32, suffix, 128)  # [K, U, H]; as many numbers as activations of the suffix
    found = {
        (name, shape)
        for name, shape in copies(compiled.as_text())
        if math.prod(shape) not in activations or shape[-3:] == layer
    }
    assert not found
