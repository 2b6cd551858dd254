"""Compiles kernels and whole decode programs with the real TPU compiler; no TPU is needed.

Needs libtpu (`pip install 'bicache-jax[test]'`). Prints a table; `--json FILE` also writes it. This command made
`scripts/results/tpu_compile.json`:

    python scripts/compile_kernels.py --json scripts/results/tpu_compile.json
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bicache_jax.core.config import BlockCache, CacheDtype
from bicache_jax.sharding.topologies import slice_devices

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
KERNEL_SHAPES: list[Any] = [
    # model, query heads, KV heads, queries, dtype, block (0: full attention), whether the prefix is in 8 bits;
    # rows 8, prefixes 2, P 1024, S 384, H 128
    *[(f"{model} T={t}", n, k, t, "bfloat16") for model, n, k in (("LLaDA-8B", 32, 32), ("Dream-7B", 28, 4))
      for t in (384, 32)],
    ("LLaDA-8B refresh T=1408", 32, 32, 1408, "bfloat16"),
    ("LLaDA-8B T=384", 32, 32, 384, "float32"),
    # a finished block and the next one, and a prompt, under a block-causal mask
    ("LLaDA2-mini T=64", 16, 4, 64, "bfloat16", 32),
    ("SDAR-8B T=384", 32, 8, 384, "bfloat16", 4),
    ("LLaDA-8B T=384 int8", 32, 32, 384, "bfloat16", 0, True),
    ("LLaDA-8B T=384 int8", 32, 32, 384, "float32", 0, True),
    ("Dream-7B T=32 int8", 28, 4, 32, "bfloat16", 0, True),
    ("SDAR-8B T=384 int8", 32, 8, 384, "bfloat16", 4, True),
]  # fmt: skip


def device(topology: str) -> Any:
    """A device of a topology that is not attached."""
    return slice_devices(TOPOLOGIES.get(topology, topology))[0]


def kernel(
    topology: str, heads: int, kv_heads: int, queries: int, dtype: str, block: int = 0, quantized: bool = False
) -> dict[str, Any]:
    """Compiles the TPU kernel for a layer of a stacked cache.

    Returns:
        Seconds, bytes of VMEM that the kernel uses and may use, and bytes of temporary buffers in HBM.
    """
    import jax

    from bicache_jax.core import kv
    from bicache_jax.kernels import tpu

    rows, prefixes, prefix, suffix, head_dim, layers = 8, 2, 1024, 384, 128, 4
    where = device(topology)
    sharding = jax.sharding.SingleDeviceSharding(where)
    blocks = tpu.blocks_for(where.device_kind, heads // kv_heads * queries, jax.numpy.dtype(dtype).itemsize)

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shape, form = (layers, prefixes, kv_heads, prefix, head_dim), "int8" if quantized else "auto"
    parts = jax.eval_shape(lambda: kv.zeros(shape, dtype, form))  # type: ignore[arg-type]
    cache = jax.tree.map(lambda part: array(*part.shape, dtype=part.dtype), parts)
    own = array(rows, kv_heads, suffix, head_dim)
    attend = functools.partial(tpu.prefix_attention, blocks=blocks)
    call = jax.jit(
        lambda q, k_prefix, v_prefix, k, v, index, length, valid, layer, block_ids: attend(
            q,
            k_prefix,
            v_prefix,
            k,
            v,
            prefix_index=index,
            prefix_len=length,
            suffix_valid=valid,
            block_ids=block_ids,
            layer=layer,
        )
    )
    ids = (array(rows, queries, dtype="int32"), array(rows, suffix, dtype="int32")) if block else None
    scalars = (array(rows, dtype="int32"), array(prefixes, dtype="int32"), array(rows, suffix, dtype="bool"))
    lowered = call.lower(
        array(rows, heads, queries, head_dim), cache, cache, own, own, *scalars, array(dtype="int32"), ids
    )
    started = time.perf_counter()
    compiled: Any = lowered.compile()
    seconds = time.perf_counter() - started
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', calls[0])
    if len(calls) != 1 or used is None:
        raise RuntimeError(f"{topology}: expected one kernel that says how much VMEM it uses")
    return {
        "seconds": round(seconds, 1),
        "vmem_bytes": int(used[1]),
        "vmem_limit_bytes": blocks.vmem_mib << 20,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def lower_program(
    topology: str,
    *,
    shape: str = "llada_8b",
    layers: int = 4,
    boundary: int = 1,
    rows: int = 1,
    prefix: int = 256,
    suffix: int = 128,
    block_cache: BlockCache = "off",
    cache_dtype: CacheDtype = "auto",
    **changes: Any,
) -> Any:
    """Lowers the decode program with a published model's widths and a few layers, in bfloat16.

    Args:
        topology: generation of TPUs, or a slice.
        shape: the model.
        layers: L.
        boundary: b.
        rows: B.
        prefix: P.
        suffix: U.
        block_cache: what is frozen inside a block.
        cache_dtype: how prefix KV are kept.
        **changes: further fields of the architecture that are not the model's.
    """
    import jax
    import jax.numpy as jnp

    from bicache_jax import CacheConfig, Request, SamplingConfig
    from bicache_jax.configs import model_shape
    from bicache_jax.models import abstract
    from bicache_jax.serving.grouping import Row, plan_batches
    from bicache_jax.serving.memory import Buffers
    from bicache_jax.serving.plan import Plan
    from bicache_jax.serving.programs import lower_decode
    from bicache_jax.wiring import backbone_for

    config = dataclasses.replace(model_shape(shape), num_layers=layers, **changes)
    gen_length = suffix // 2
    sampling = SamplingConfig(gen_length)
    cache = CacheConfig(boundary=boundary, block_cache=block_cache, cache_dtype=cache_dtype)
    prompt = (1,) * (prefix + suffix - gen_length)
    requests = [Row(Request(str(row), prompt, prefix, sampling), 0, prefix, 70, boundary) for row in range(rows)]
    batches = plan_batches(requests, mask_id=config.mask_id, cache=cache, batch_size=rows)
    dtype = jnp.dtype(jnp.bfloat16)
    rounds = [(batch,) for batch in batches]
    plan = Plan(config, dtype, cache, tuple(rounds), Buffers.of(rounds, layers))
    sharding = jax.sharding.SingleDeviceSharding(device(topology))
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract(config, dtype)
    )
    return lower_decode(backbone_for(config), params, plan, batches[0])


def rows(topologies: list[str]) -> Iterator[dict[str, Any]]:
    """Compiles every kernel shape for every topology."""
    for topology in topologies:
        for name, *sizes in KERNEL_SHAPES:
            yield {"topology": topology, "shape": name, "dtype": sizes[3]} | kernel(topology, *sizes)


def main() -> None:
    """Compiles, prints, and writes JSON if requested."""
    parser = argparse.ArgumentParser(description="Compile the TPU kernels without a TPU.")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES), metavar="LIST", help="(default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the table here")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the target topology is not attached
    import importlib.metadata

    table = []
    for row in rows(args.topologies.split(",")):
        table.append(row)
        print(
            f"{row['topology']:6} {row['shape']:24} {row['dtype']:9} {row['seconds']:5.1f} s"
            f"  VMEM {row['vmem_bytes'] / 2**20:5.2f} of {row['vmem_limit_bytes'] >> 20} MiB",
            flush=True,
        )
    if args.json:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        lines = ",\n".join("    " + json.dumps(row) for row in table)
        text = f'{{\n  "versions": {json.dumps(versions)},\n  "kernels": [\n{lines}\n  ]\n}}\n'
        Path(args.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
