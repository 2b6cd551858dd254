"""Compiles a model's encode and decode programs for a TPU slice that is not attached, and compares with the planner."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bicache_jax.core.backbone import Backbone, Params
from bicache_jax.core.boundary import boundary_at
from bicache_jax.core.buckets import count_bucket, length_bucket
from bicache_jax.core.config import CACHED_BLOCK, BlockCache, CacheConfig, ModelConfig, Quantize, SamplingConfig
from bicache_jax.core.types import BicacheError, Request
from bicache_jax.measure.hlo import Collective, collectives, compile_with_text, crossing
from bicache_jax.serving.flops import Job, batch_seconds, jobs, row_flops
from bicache_jax.serving.grouping import Batch, Row, prefix_ratio
from bicache_jax.serving.memory import Buffers, Footprint
from bicache_jax.serving.placement import Placement
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.programs import lower_decode, lower_encode
from bicache_jax.sharding import make_mesh, param_shardings
from bicache_jax.sharding.topologies import slice_devices
from bicache_jax.wiring import Topology, abstract_params, backbone_for, model_shape, published_table, topology

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One compile check.

    Attributes:
        config: name of a model shape.
        topology: the slice, for example `v5e:2x4`.
        mesh: how its devices are used, for example `data=2,model=4`.
        prefix: P.
        suffix: U.
        rows: B per data shard; None: as many as should fit.
        per_prefix: rows that share a prefix.
        boundary: b; None: from the published table, or half of the layers where there is none; under block-causal
            attention always L.
        gen_length: response tokens.
        block_length: tokens per block; None: the model's own under block-causal attention, else 32.
        block_cache: what is frozen inside a block.
        dtype: dtype of parameters and caches.
        quantize: format of the weights.
    """

    config: str
    topology: str
    mesh: str
    prefix: int = 1024
    suffix: int = 512
    rows: int | None = 8
    per_prefix: int = 16
    boundary: int | None = None
    gen_length: int = 256
    block_length: int | None = None
    block_cache: BlockCache = "off"
    dtype: str = "bfloat16"
    quantize: Quantize = "none"


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A case with everything that its programs are lowered from."""

    placement: Placement
    backbone: Backbone
    params: Params
    boundary: int
    most_rows: int
    plan: Plan
    footprint: Footprint

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of the mesh's axes."""
        assert self.placement.mesh is not None
        return dict(self.placement.mesh.shape)


def _config(case: AotCase) -> ModelConfig:
    return dataclasses.replace(model_shape(case.config), quantize=case.quantize)


def _setting(case: AotCase) -> _Setting:
    config, chip = _config(case), topology(case.topology)
    mesh = make_mesh(case.mesh, slice_devices(case.topology))
    placement, dtype = Placement(config, mesh), jnp.dtype(case.dtype)
    backbone = backbone_for(placement.partition.local, axis=placement.axis)
    shapes = abstract_params(placement.partition.config, dtype)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        param_shardings(backbone.axes, shapes, mesh),
    )
    boundary, cache = _boundary(case, config), _cache(case, config)
    footprint = Footprint.of(
        placement.partition, [boundary], dtype, block_cache=cache.block_cache != "off", copies=chip.copies
    )
    most = footprint.most_rows(
        chip.hbm_gib * GIB,
        prefix=length_bucket(case.prefix),
        suffix=length_bucket(case.suffix),
        per_prefix=case.per_prefix,
    )
    asked = case.rows or most
    if not asked:
        raise BicacheError(f"mesh {case.mesh}: not even one row should fit; cut the model over more devices")
    plan = _plan(case, placement, boundary, asked)
    return _Setting(placement, backbone, params, boundary, most, plan, footprint)


def _boundary(case: AotCase, config: ModelConfig) -> int:
    if config.block_causal:
        return config.num_layers
    if case.boundary is not None:
        return case.boundary
    table = published_table(config)
    if table is None:
        return config.num_layers // 2
    return boundary_at(table.table, prefix_ratio(case.prefix, case.prefix + case.suffix))


def _cache(case: AotCase, config: ModelConfig) -> CacheConfig:
    return CacheConfig(policy="auto" if case.prefix else "none", block_cache=case.block_cache).for_model(config)


def compile_decode(case: AotCase) -> tuple[Plan, dict[str, int], str]:
    """Compiles the decode program; returns the plan, the sizes of the mesh's axes and the program's HLO.

    Raises:
        BicacheError: the model, slice or mesh does not exist, they cannot be combined, or the program does not fit.
    """
    one = _setting(case)
    lowered = lower_decode(one.backbone, one.params, one.plan, *one.plan.rounds[0], mesh=one.placement.mesh)
    try:
        return one.plan, one.mesh, compile_with_text(lowered)[1]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise BicacheError(f"{case.config} on {case.topology}, mesh {case.mesh}: the program does not fit") from None


def check(case: AotCase) -> dict[str, Any]:
    """Compiles both programs and compares them with the planner.

    Returns:
        JSON values: the shape, the planned memory, the compiler's figures for each program, and whether both fit.

    Raises:
        BicacheError: the model, slice or mesh does not exist, or they cannot be combined.
    """
    one, config, chip = _setting(case), _config(case), topology(case.topology)
    plan, mesh = one.plan, one.mesh
    groups, prefix, rows, suffix = plan.shape(*plan.rounds[0])
    planned = one.footprint.memory(groups=groups, prefix=prefix, rows=rows, suffix=suffix)
    runs = jobs(plan.batches[0].rows, plan.cache)
    found: dict[str, Any] = {
        "config": case.config,
        "topology": case.topology,
        "mesh": mesh,
        "hbm_gib": chip.hbm_gib,
        "rows": rows,
        "prefixes": groups,
        "prefix": prefix,
        "suffix": suffix,
        "boundary": one.boundary,
        "dtype": case.dtype,
        "quantize": case.quantize,
        "planned_bytes": planned.total,
        "flops_per_device": sum(row_flops(config, job) for job in runs) / mesh["model"],
        "links_share": _links_share(config, chip, runs, mesh["model"], jnp.dtype(case.dtype).itemsize),
        "decode": _compile(lower_decode, one.backbone, one.params, plan, one.placement),
        "encode": _compile(lower_encode, one.backbone, one.params, plan, one.placement),
    }
    found["fits"] = bool(found["decode"]["fits"] and found["encode"]["fits"])
    if not found["fits"]:
        found["largest_rows"] = min(one.most_rows, _bucket_below(rows))
    return found


def _links_share(config: ModelConfig, chip: Topology, runs: Sequence[Job], split: int, itemsize: int) -> float:
    """Share of a run that its sums over the model axis take at least, with the rest at the peak of arithmetic.

    The runs are equal.
    """

    def seconds(sums: Callable[[float], float]) -> float:
        peak = split * chip.tflops_bfloat16 * 1e12
        return batch_seconds(config, runs[0], len(runs), peak=peak, itemsize=itemsize, published=False, sums=sums)

    free = seconds(lambda nbytes: 0.0)
    return round(1 - free / seconds(lambda nbytes: chip.all_reduce_seconds(nbytes, split)), 3)


def _plan(case: AotCase, placement: Placement, boundary: int, rows: int) -> Plan:
    """A round of equal batches of the requested shape."""
    config = placement.config
    groups = -(-rows // case.per_prefix)
    response = min(case.gen_length, case.suffix - config.shifted)  # shifted logits need a prompt token first
    block = min(case.block_length or (config.block_length if config.block_causal else CACHED_BLOCK), response)
    sampling = SamplingConfig(response - response % block, None, block)
    rest = tuple(range(case.suffix - sampling.gen_length))
    made = []
    for number in range(rows):
        prefix = (number * groups // rows, *range(1, case.prefix))[: case.prefix]
        made.append(Row(Request(str(number), prefix + rest, case.prefix, sampling), 0, case.prefix, 0, boundary))
    prefixes = tuple(dict.fromkeys(row.prefix for row in made))
    batch = Batch(tuple(made), prefixes, tuple(prefixes.index(row.prefix) for row in made), boundary)
    rounds = ((batch,) * placement.shards,)
    return Plan(config, jnp.dtype(case.dtype), _cache(case, config), rounds, Buffers.of(rounds, config.num_layers))


def _compile(
    lower: Callable[..., Any], backbone: Backbone, params: Params, plan: Plan, placement: Placement
) -> dict[str, Any]:
    """The compiler's figures for a program; only `needs_gib` if it does not fit."""
    assert placement.mesh is not None
    started = time.perf_counter()
    try:
        program, text = compile_with_text(lower(backbone, params, plan, *plan.rounds[0], mesh=placement.mesh))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)G of|\(([\d.]+)G\) exceeds", str(error))
        return {"fits": False, "needs_gib": float(used[1] or used[2]) if used else None}
    memory, talk = program.memory_analysis(), collectives(text)
    return {
        "fits": True,
        "arguments_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "compiler_flops": program.cost_analysis().get("flops"),  # loop bodies counted once
        "collectives": _by_kind(talk),
        "collectives_over_data": len(crossing(talk, placement.mesh.devices.shape)),
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def _by_kind(talk: Sequence[Collective]) -> dict[str, Any]:
    """Number of instructions and bytes of each kind of collective."""
    counts = Counter(one.kind for one in talk)
    return {
        kind: {"instructions": count, "bytes": sum(one.nbytes for one in talk if one.kind == kind)}
        for kind, count in sorted(counts.items())
    }


def _bucket_below(rows: int) -> int:
    """The next smaller bucket of rows; 0 below the first."""
    return max((count_bucket(fewer) for fewer in range(1, rows) if count_bucket(fewer) < rows), default=0)


def describe(found: dict[str, Any]) -> str:
    """The result of `check` as text."""
    shape = f"B={found['rows']} G={found['prefixes']} P={found['prefix']} U={found['suffix']} b={found['boundary']}"
    lines = [f"{found['config']} on {found['topology']}, mesh {found['mesh']}, {shape}, {found['dtype']}"]
    for name in ("encode", "decode"):
        part = found[name]
        if not part["fits"]:
            lines.append(f"{name}: does not fit into {found['hbm_gib']} GiB (needs {part['needs_gib']} GiB)")
            continue
        gib = {key: part[f"{key}_bytes"] / GIB for key in ("arguments", "output", "temporaries", "peak")}
        sizes = ", ".join(f"{key} {value:.2f}" for key, value in gib.items())
        lines.append(f"{name}: GiB a device: {sizes}; {_talk_line(part)}")
    lines.append(f"planned: {found['planned_bytes'] / GIB:.2f} GiB of {found['hbm_gib']} GiB")
    if found["links_share"]:
        lines.append(
            f"sums over the model axis take at least {found['links_share']:.0%} of a run at the speed of the links; a"
            " mesh with model=1 has none"
        )
    if not found["fits"]:
        lines.append(f"largest number of rows that should fit: {found['largest_rows']}")
    return "\n".join(lines)


def _talk_line(part: dict[str, Any]) -> str:
    talk = ", ".join(f"{one['instructions']} {kind}" for kind, one in part["collectives"].items()) or "none"
    return f"collectives: {talk}; over data: {part['collectives_over_data']}"
