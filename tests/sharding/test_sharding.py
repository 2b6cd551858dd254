"""Meshes: the same tokens as one device, prefixes where their rows are, and nothing said between data shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bicache_jax import BicacheError, ModelConfig
from bicache_jax.configs import model_shape
from bicache_jax.measure.hlo import Collective, collectives, crossing
from bicache_jax.models import AXES, abstract
from bicache_jax.sharding import Partition, make_mesh, param_specs

SMALL = ModelConfig("llada", 61, 24, 3, 6, 3, 4, 22, 1e4, 1e-5, 512, 5, qkv_bias=True, bias=True, head_bias=True)


@pytest.mark.parametrize(
    ("family", "extent"),
    [
        pytest.param("llada", "some", marks=pytest.mark.slow),
        *[pytest.param(family, "some", marks=pytest.mark.full) for family in ("dream", "odd")],
        *[pytest.param(family, "all", marks=pytest.mark.full) for family in ("llada", "dream", "odd")],
    ],
)
def test_meshes_of_eight_devices_answer_as_one_device_does(family: str, extent: str) -> None:
    child = Path(__file__).parents[1].joinpath("sharded_run.py")
    done = subprocess.run([sys.executable, str(child), family, extent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert sum(len(by_mesh) for by_mesh in found["differing"].values()) >= (1 if family == "odd" else 3)
    for policy, by_mesh in found["differing"].items():
        assert by_mesh and not any(by_mesh.values()), (policy, by_mesh)
    if inspected := found.get("inspect"):
        assert inspected["own"] == inspected["expected"] > 4
        assert inspected["strangers"] == 0
        assert inspected["collectives"] > 0 and inspected["crossing"] == 0
        assert inspected["control"] == 1


@pytest.mark.parametrize("name", ["llada_8b", "dream_7b"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
def test_published_models_are_cut_with_little_waste(name: str, shards: int) -> None:
    config = model_shape(name)
    layout = Partition(config, shards)
    if name == "llada_8b" or shards <= 4:
        assert layout.config == config
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))
    padded = sum(leaf.size for leaf in jax.tree.leaves(abstract(layout.config)))
    assert size <= padded <= 1.08 * size


@pytest.mark.parametrize("shards", range(1, 10))
def test_every_head_is_computed_once_beside_its_key_and_value(shards: int) -> None:
    config, layout = SMALL, Partition(SMALL, shards)
    size = config.head_dim

    def heads(axis: str, count: int) -> np.ndarray:
        source = layout.source(axis)
        elements = np.arange(count * size) if source is None else source
        assert (elements.reshape(-1, size) - elements[::size, None] == np.arange(size)).all(
            where=elements[0::size, None] >= 0
        )
        return np.where(elements[::size] < 0, -1, elements[::size] // size)

    q, kv = heads("heads", config.num_heads), heads("kv_heads", config.num_kv_heads)
    assert len(q) == layout.config.num_heads and len(kv) == layout.config.num_kv_heads
    assert len(q) % shards == len(kv) % shards == 0
    assert sorted(q[q >= 0]) == list(range(config.num_heads))
    group = len(q) // len(kv)
    for place, head in enumerate(q):
        if head >= 0:
            assert kv[place // group] == head // (config.num_heads // config.num_kv_heads)


def test_partition_table_covers_every_parameter_and_says_what_it_lacks() -> None:
    params = abstract(SMALL)
    specs = param_specs(AXES, params)
    assert jax.tree.structure(specs) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="extra is not in the partition table"):
        param_specs(AXES, {"extra": params["embed"]})
    with pytest.raises(ValueError, match="has 1 axes"):
        param_specs(AXES, {"embed": params["head_bias"]})
    with pytest.raises(ValueError, match="twice"):
        param_specs({("embed",): ("vocab", "heads")}, {"embed": params["embed"]})


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("data=two", "expected data=INT"),
        ("rows=2", "expected data=INT"),
        ("data=1,data=1", "expected"),
        ("data=64", "needs 64"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(spec: str, fault: str) -> None:
    with pytest.raises(BicacheError, match=fault):
        make_mesh(spec)


def test_collectives_are_read_from_every_form_of_groups() -> None:
    text = """
  %a = f32[2,8]{1,0} all-reduce(f32[2,8]{1,0} %x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum
  %b = (bf16[4]{0}, bf16[8]{0}) all-gather-start(bf16[4]{0} %x), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %c = s32[] all-reduce(s32[] %x), replica_groups={}, to_apply=%sum
  %d = f32[4]{0} collective-permute(f32[4]{0} %x), source_target_pairs={{0,1},{1,0}}
  %e = f32[4]{0} add(f32[4]{0} %x, f32[4]{0} %all-reduce)
"""
    found = collectives(text)
    assert found == [
        Collective("all-reduce", ((0, 1), (2, 3)), 64),
        Collective("all-gather", ((0, 2), (1, 3)), 24),
        Collective("all-reduce", (), 4),
        Collective("collective-permute", ((0, 1), (1, 0)), 16),
    ]
    assert crossing(found, (2, 2)) == found[1:3]
    assert crossing(found, (1, 4)) == []
