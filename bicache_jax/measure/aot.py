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
from bicache_jax.core.buckets import count_bucket
from bicache_jax.core.types import BicacheError
from bicache_jax.measure.hlo import Collective, collectives, compile_with_text, crossing
from bicache_jax.serving.capacity import GIB as GIB
from bicache_jax.serving.capacity import Shape
from bicache_jax.serving.flops import jobs, row_flops
from bicache_jax.serving.memory import Buffers, Footprint
from bicache_jax.serving.placement import Placement
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.programs import lower_decode, lower_encode
from bicache_jax.sharding import make_mesh, param_shardings
from bicache_jax.sharding.topologies import slice_devices
from bicache_jax.wiring import Topology, abstract_params, backbone_for, topology


@dataclasses.dataclass(frozen=True)
class AotCase(Shape):
    """One compile check: a batch on a slice.

    Attributes:
        topology: the slice, for example `v5e:2x4`.
        mesh: how its devices are used, for example `data=2,model=4`.
    """

    topology: str
    mesh: str


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A case with everything that its programs are lowered from."""

    placement: Placement
    backbone: Backbone
    params: Params
    most_rows: int
    plan: Plan
    footprint: Footprint

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of the mesh's axes."""
        assert self.placement.mesh is not None
        return dict(self.placement.mesh.shape)


def _setting(case: AotCase) -> _Setting:
    config, chip = case.model, topology(case.topology)
    mesh = make_mesh(case.mesh, slice_devices(case.topology))
    placement, dtype = Placement(config, mesh), jnp.dtype(case.dtype)
    backbone = backbone_for(placement.partition.local, axis=placement.axis)
    shapes = abstract_params(placement.partition.config, dtype)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        param_shardings(backbone.axes, shapes, mesh),
    )
    split = placement.partition.shards
    most = case.most_rows(chip.memory_gib * GIB, split, chip.copies)
    asked = case.settled(most)
    if not asked:
        raise BicacheError(f"mesh {case.mesh}: not even one row should fit; cut the model over more devices")
    rounds = ((case.batch(asked),) * placement.shards,)
    plan = Plan(config, dtype, case.cache, rounds, Buffers.of(rounds, config.num_layers))
    return _Setting(placement, backbone, params, most, plan, case.footprint(split, chip.copies))


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
    one, config, chip = _setting(case), case.model, topology(case.topology)
    plan, mesh = one.plan, one.mesh
    groups, prefix, rows, suffix = plan.shape(*plan.rounds[0])
    planned = one.footprint.memory(groups=groups, prefix=prefix, rows=rows, suffix=suffix)
    runs = jobs(plan.batches[0].rows, plan.cache)
    found: dict[str, Any] = {
        "config": case.config,
        "topology": case.topology,
        "mesh": mesh,
        "hbm_gib": chip.memory_gib,
        "rows": rows,
        "prefixes": groups,
        "prefix": prefix,
        "suffix": suffix,
        "boundary": case.layers,
        "dtype": case.dtype,
        "quantize": case.quantize,
        "cache_dtype": case.cache_dtype,
        "planned_bytes": planned.total,
        "flops_per_device": sum(row_flops(config, job) for job in runs) / mesh["model"],
        "links_share": _links_share(case, len(runs), chip, mesh["model"]),
        "decode": _compile(lower_decode, one.backbone, one.params, plan, one.placement),
        "encode": _compile(lower_encode, one.backbone, one.params, plan, one.placement),
    }
    found["fits"] = bool(found["decode"]["fits"] and found["encode"]["fits"])
    if not found["fits"]:
        found["largest_rows"] = min(one.most_rows, _bucket_below(rows))
    return found


def _links_share(case: AotCase, rows: int, chip: Topology, split: int) -> float | None:
    """Share of a run that its sums over the model axis take at least, with the rest at peak rates.

    None where no peak is published for what is multiplied.
    """
    try:
        free, whole = (case.seconds(rows, chip, split, links=links) for links in (False, True))
    except BicacheError:
        return None
    return round(1 - free / whole, 3)


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
