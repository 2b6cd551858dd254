"""Prefix attention's kernels, interpreted on the CPU: against float64, against the specification, and at the edges."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from bicache_jax import BicacheError, CacheConfig, Engine, load_model
from bicache_jax.cli import main
from bicache_jax.core import attention
from bicache_jax.kernels import dispatch, gpu, prefix_attention, tpu
from bicache_jax.testing import SMALL_CASES, attend, error_over_bound, exact, operands
from bicache_jax.testing import AttentionCase as Case
from scripts import benchmark_kernels

SMALL = tpu.Blocks(queries=16, keys=128, chunks=2)
CASES = SMALL_CASES


def _check(case: Case, call: Any) -> None:
    out, specification, wanted = attend(case, call), attend(case, attention.prefix_attention), exact(case)
    assert error_over_bound(out, wanted, case.dtype) <= 1
    assert error_over_bound(out, specification, case.dtype) <= 1
    if case.prefixes > 1 or not case.prefix:
        assert not out[0].any(), "a row with nothing valid gives zeros"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_tpu_kernel(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """In the interpreter of TPUs: memory starts as NaN, races are reported, two cores take the parallel axes."""
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", random_seed=1, num_cores_or_threads=2
    )
    _check(case, functools.partial(tpu.prefix_attention, blocks=SMALL, interpret=interpret))
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_the_triton_kernel(case: Case) -> None:
    form = gpu.Form("triton", queries=32, keys=16)
    _check(case, functools.partial(gpu.prefix_attention, form=form, interpret=True))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_the_triton_kernel_lowers(case: Case) -> None:
    """The interpreter is more lenient: it broadcasts masks that Triton does not."""
    arrays, settings = operands(case)
    run = jax.jit(functools.partial(gpu.prefix_attention, form=gpu.Form("triton", queries=32, keys=16)))
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    exported = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)(*arrays, **settings)
    assert "xla.gpu.triton" in exported.mlir_module()


@pytest.mark.parametrize("case", [*CASES[1:4], Case(2, 1, 4, 2, 16, 9, 3, 5)], ids=str)
def test_the_library_form(case: Case) -> None:
    _check(case, functools.partial(gpu.prefix_attention, form=gpu.Form("library")))


@pytest.mark.parametrize("case", [*CASES[1:4], CASES[4], CASES[6]], ids=str)
def test_the_joined_form(case: Case) -> None:
    _check(case, functools.partial(gpu.prefix_attention, form=gpu.Form("joined")))


def test_the_joined_form_takes_tokamax_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, by a stand-in; tokamax's own kernels need a GPU."""
    asked: list[tuple[tuple[int, ...], Any]] = []

    def stand_in(q: Any, k: Any, v: Any, *, scale: float, key_value_seq_lengths: Any, implementation: Any) -> Any:
        asked.append((k.shape, implementation))
        return jax.nn.dot_product_attention(q, k, v, scale=scale, key_value_seq_lengths=key_value_seq_lengths)

    def forms() -> set[tuple[str, str]]:
        return {(form.form, form.library) for form in gpu.candidates(512, 128, "bfloat16")}

    assert ("joined", "cudnn") in forms()
    monkeypatch.setattr(gpu.joined, "has", lambda library: library != "tokamax")
    assert ("joined", "tokamax") not in forms()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(dot_product_attention=stand_in))
    monkeypatch.setattr(gpu.joined, "has", lambda library: True)
    assert ("joined", "tokamax") in forms()
    case = CASES[1]
    _check(case, functools.partial(gpu.prefix_attention, form=gpu.Form("joined", library="tokamax")))
    assert {shape for shape, _ in asked} == {(case.rows, case.prefix + case.suffix, case.kv, case.head_dim)}
    assert asked[0][1][0] == "mosaic"


def test_chunks_of_padding_are_not_read() -> None:
    """NaN in them would spread over the result."""
    case = Case(2, 2, 2, 2, 16, 512, 4, 4)
    tensors, named = case.arrays()
    lengths = np.asarray([128, 0], np.int32)[np.argsort(named["index"])]
    for tensor in tensors[1:3]:
        for prefix, length in enumerate(lengths):
            tensor[prefix, :, length:] = np.nan
    cast = [jnp.asarray(tensor, jnp.float32) for tensor in tensors]
    settings = {"prefix_index": jnp.asarray(named["index"]), "prefix_len": jnp.asarray(lengths)}
    valid = jnp.ones((2, 4), bool)
    interpreted = tpu.prefix_attention(*cast, **settings, suffix_valid=valid, blocks=SMALL, interpret=True)
    assert np.isfinite(interpreted).all()


def _fetches(case: Case, blocks: tpu.Blocks, prefix_len: np.ndarray) -> int:
    """Prefix key chunks that the grid fetches: the pipeline copies a block whose place is not that of the step before.

    `prefix_len` is per row.
    """
    folded = case.heads // case.kv * case.queries
    tiling = tpu.Tiling.of(folded, case.prefix, case.suffix, blocks)
    specs, _ = tpu.block_specs(tiling, case.head_dim)
    index = np.sort(np.arange(case.rows) % case.prefixes)
    suffix_len = np.full(case.rows, case.suffix, np.int32)
    fetched = 0
    for spec in specs[1 : 1 + tiling.chunks]:
        before = None
        for step in np.ndindex(case.kv, case.rows, tiling.count_q, tiling.steps):
            place = tuple(int(at) for at in spec.index_map(*step, np.zeros(1, np.int32), index, prefix_len, suffix_len))
            fetched += place != before
            before = place
    return fetched


def test_a_prefix_is_fetched_once_for_consecutive_rows_and_its_padding_is_not() -> None:
    blocks = tpu.Blocks(queries=16, keys=128, chunks=4)
    case = Case(rows=8, prefixes=2, heads=3, kv=3, head_dim=16, prefix=512, queries=40, suffix=8)
    full = np.full(8, 512, np.int32)
    assert _fetches(case, blocks, full) == 3 * 2 * 4, "KV heads, prefixes, chunks; not rows, not blocks of queries"
    # Of chunks that are padding in every row, the one block that a pipeline must start with.
    assert _fetches(case, blocks, np.full(8, 130, np.int32)) == 3 * 2 * 2 + 2
    assert _fetches(case, blocks, np.zeros(8, np.int32)) == 4
    # Longer than what stays: each row fetches it again.
    assert _fetches(case, dataclasses.replace(blocks, chunks=2), full) > 3 * 2 * 4


def _small(dtype: str = "float32", head_dim: int = 16) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    tensors, named = Case(2, 2, 2, 2, head_dim, 8, 4, 4).arrays()
    settings = {"prefix_len": named["lengths"], "suffix_valid": named["valid"], "prefix_index": named["index"]}
    return [jnp.asarray(tensor, dtype) for tensor in tensors], {k: jnp.asarray(v) for k, v in settings.items()}


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_by_name_it_serves_or_raises(implementation: str) -> None:
    arrays, settings = _small()
    wanted = prefix_attention(*arrays, **settings, implementation="xla")
    run = functools.partial(prefix_attention, **settings, implementation=implementation)
    np.testing.assert_allclose(run(*arrays, interpret=True), wanted, atol=1e-6)
    with pytest.raises(NotImplementedError, match="for cpu"):
        jax.jit(run)(*arrays)
    with pytest.raises(NotImplementedError, match="cpu"):
        run(*arrays)
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda q: run(q, *arrays[1:], interpret=True).sum())(arrays[0])
    with pytest.raises(NotImplementedError, match="one dtype"):
        run(arrays[0].astype(jnp.bfloat16), *arrays[1:])


def test_auto_has_the_gradient_of_the_plain_form() -> None:
    arrays, settings = _small()

    def loss(q: jax.Array, implementation: str) -> jax.Array:
        return jnp.sum(prefix_attention(q, *arrays[1:], **settings, implementation=implementation) ** 2)

    auto, plain = (jax.grad(loss)(arrays[0], name) for name in ("auto", "xla"))
    np.testing.assert_allclose(auto, plain, atol=1e-6)


def test_auto_goes_by_the_platform_that_a_program_is_for() -> None:
    arrays, settings = _small("bfloat16", head_dim=64)
    unsafe = jax.export.DisabledSafetyCheck.custom_call
    checks = [unsafe("tpu_custom_call"), unsafe("__gpu$xla.gpu.triton")]

    @jax.jit
    def run(*arrays: jax.Array) -> jax.Array:
        return prefix_attention(*arrays, **settings)

    def module(platform: str) -> str:
        return jax.export.export(run, platforms=[platform], disabled_checks=checks)(*arrays).mlir_module()

    found = {platform: module(platform) for platform in ("cpu", "cuda", "tpu")}
    for call, platform in (("tpu_custom_call", "tpu"), ("xla.gpu.triton", "cuda")):
        assert [name for name, text in found.items() if call in text] == [platform]


def test_auto_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, settings = _small("float16")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="plain JAX.*float16"):
        jax.eval_shape(functools.partial(prefix_attention, **settings), *arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(functools.partial(prefix_attention, **settings), *arrays)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("prefix_len", (3,)), ("suffix_valid", (2, 5)), ("prefix_index", (3,))],
)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...]) -> None:
    arrays, settings = _small()
    settings[name] = jnp.zeros(shape, settings[name].dtype)
    unchecked = getattr(dispatch.check, "__wrapped__", dispatch.check)
    with pytest.raises(ValueError, match=name):
        unchecked(*arrays, **settings, layer=None)
    with pytest.raises(ValueError, match="k_prefix"):
        unchecked(*arrays, **settings, layer=0)


@pytest.mark.parametrize("implementation", ["auto", "pallas_tpu", "pallas_gpu"])
def test_it_runs_inside_shard_map(implementation: str) -> None:
    """Rows over `data`, heads over `model`, prefixes the same for all rows."""
    arrays, settings = _small()
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, shared = PartitionSpec("data", "model"), PartitionSpec(None, "model")
    interpret = {} if implementation == "auto" else {"implementation": implementation, "interpret": True}

    def run(q, k_prefix, v_prefix, k, v, index, lengths, valid):
        return prefix_attention(
            q, k_prefix, v_prefix, k, v, prefix_index=index, prefix_len=lengths, suffix_valid=valid, **interpret
        )

    specs = (rows, shared, shared, rows, rows, PartitionSpec("data"), PartitionSpec(), PartitionSpec("data"))
    # Interpreters are made of ordinary operations, which are not all typed for manual axes.
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=implementation == "auto")
    named = (settings["prefix_index"], settings["prefix_len"], settings["suffix_valid"])
    out = jax.jit(sharded)(*arrays, *named)
    np.testing.assert_allclose(out, prefix_attention(*arrays, **settings, implementation="xla"), atol=1e-6)
    if implementation == "auto":
        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("tpu_custom_call",)]
        exported = jax.export.export(jax.jit(sharded), platforms=["tpu"], disabled_checks=checks)(*arrays, *named)
        assert "tpu_custom_call" in exported.mlir_module()


def test_the_command_names_a_kernel_that_does_not_run_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"prompt_ids": [5, 6, 7]}\n')
    job = ["generate", "--model", str(golden.FOLDERS["llada"]), "--input", str(requests)]
    job += ["--output", str(tmp_path / "out.jsonl"), "--boundary", "2"]
    assert main([*job, "--attention", "pallas_tpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(BicacheError, match="pallas_gpu runs on cuda, and this is for cpu"):
        Engine(load_model(golden.FOLDERS["llada"]), cache=CacheConfig(boundary=2), attention="pallas_gpu")
    with pytest.raises(BicacheError, match="one of auto"):
        Engine(load_model(golden.FOLDERS["llada"]), cache=CacheConfig(boundary=2), attention="magic")


def test_the_benchmark_prints_a_row_a_shape_and_the_crossover(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_kernels, "matmul_peak", lambda dtype: lambda: 1e9)  # takes seconds to measure
    kept = tmp_path / "table.json"
    shape = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--dtype", "float32", "--seconds", "0.001"]
    benchmark_kernels.main(
        ["--rows", "1,2", "--prefixes", "2", "--prefix", "8", "--queries", "3", *shape, "--json", str(kept)]
    )
    assert "rows 2, prefixes 2, T 3: faster than gathered" in capsys.readouterr().out
    (row,) = json.loads(kept.read_text())["table"]
    assert (row["rows"], row["P"], row["T"]) == (2, 8, 3)
    assert row["gflop_s"] * row["ms"] * 1e6 == pytest.approx(4 * 2 * 4 * 3 * (8 + 3) * 16)
    moved = 2 * 4 * 16 * (2 * 4 * 3 + 2 * (2 * 8 + 2 * 3))
    assert row["gb_s"] * row["ms"] * 1e6 == pytest.approx(moved)


def test_the_crossover_is_where_it_stays_faster() -> None:
    def table(*speedups: float) -> list[dict[str, float]]:
        return [
            {"rows": 1, "prefixes": 1, "T": 4, "P": 2**place, "speedup": speedup}
            for place, speedup in enumerate(speedups)
        ]

    assert benchmark_kernels.crossover(table(2, 0.5, 1.5, 3))[0].endswith("from P = 4 on")
    assert benchmark_kernels.crossover(table(2, 0.5))[0].endswith("nowhere up to P = 2")
