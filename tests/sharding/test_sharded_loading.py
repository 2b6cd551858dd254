"""Loading straight to shards: every process reads its own bytes, and no process ever holds the whole model."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from golden import FOLDERS, model
from hypothesis import strategies as st
from safetensors.numpy import save_file

from bicache_jax.checkpoints.fields import read_json
from bicache_jax.checkpoints.safetensors_folder import SafetensorsFolder, read_part
from bicache_jax.checkpoints.targets import Target
from bicache_jax.checkpoints.tree import paths
from bicache_jax.convert import convert
from bicache_jax.loading import tensor_map
from bicache_jax.models import abstract, registered

CHILD = str(Path(__file__).parents[1].joinpath("load_child.py"))
MIB = 2**20


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A LLaDA checkpoint of 132 MiB with random weights."""
    folder = tmp_path_factory.mktemp("big")
    fields = read_json(FOLDERS["llada"] / "config.json")
    fields |= {"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "n_layers": 4, "mlp_hidden_size": 2048}
    fields |= {"vocab_size": 16384, "embedding_size": 16384}
    (folder / "config.json").write_text(json.dumps(fields))
    config = registered()["llada"].config_from_hf(fields, frozenset(), "config.json")
    rng = np.random.default_rng(0)
    tensors = {}
    mapping = tensor_map(config)
    for path, leaf in paths(abstract(config, jnp.float32)):
        for layer in range(leaf.shape[0] if path[0] == "layers" else 1):
            shape = leaf.shape[1:] if path[0] == "layers" else leaf.shape
            shape = shape[::-1] if path[-1] == "kernel" else shape
            tensors[mapping.names[path].format(layer=layer)] = rng.standard_normal(shape, np.float32)
    save_file(tensors, folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_size > 128 * MIB
    return folder


def load(folder: Path, size: int, allowance: int) -> list[subprocess.CompletedProcess[str]]:
    """Loads in `size` processes, each allowed so many MiB beyond what it has before."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": "", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, CHILD, str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(port), str(allowance)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(size)
    ]
    return [subprocess.CompletedProcess(process.args, *_finish(process)) for process in processes]


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.slow
def test_two_processes_load_a_model_that_neither_could_hold(big: Path, tmp_path: Path) -> None:
    [free] = load(big, 1, 0)
    expected = json.loads(free.stdout)
    [capped] = load(big, 1, 112)
    assert capped.returncode != 0, "the cap must be one that a whole model does not pass"
    convert(big, tmp_path / "orbax", dtype="float32")
    # orbax reads ahead as it likes: what it holds in the end is what is checked.
    for folder, allowance in ((big, 112), (tmp_path / "orbax", 0)):
        for child in load(folder, 2, allowance):
            assert child.returncode == 0, child.stderr
            found = json.loads(child.stdout.splitlines()[-1])  # gloo greets on standard output
            assert found["sums"] == expected["sums"]
            assert found["held"] == expected["held"] // 2
            assert found["read"] == (found["held"] if folder == big else 0)


@hypothesis.given(data=st.data())
def test_any_part_of_a_padded_parameter_is_the_part_of_the_whole(data: st.DataObject) -> None:
    config, whole = model("llada")
    path, leaf = data.draw(st.sampled_from(list(paths(whole))))
    sources, index = [], []
    for size in leaf.shape:
        source = data.draw(st.none() | st.lists(st.integers(-1, size - 1), min_size=1, max_size=size + 3).map(np.array))
        sources.append(source)
        size = size if source is None else len(source)
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    target = Target(leaf.shape, leaf.dtype, None, tuple(sources))
    part = tuple(index)
    with SafetensorsFolder(FOLDERS["llada"]) as tensors:
        read = functools.partial(read_part, tensors, tensor_map(config), path, leaf.shape, leaf.dtype)
        found = target.gather(read, part)
        # Bytes between those that are needed are read too, others are not.
        assert found.nbytes == tensors.bytes_read or any(source is not None for source in sources)
    padded = np.asarray(leaf)
    for axis, source in enumerate(sources):
        if source is not None:
            padded = np.concatenate([padded, np.zeros_like(padded.take([0], axis))], axis).take(source, axis)
    np.testing.assert_array_equal(found, padded[part])
    np.testing.assert_array_equal(target.expand(leaf), padded)


@pytest.mark.slow
def test_models_load_onto_meshes_as_the_engine_cuts_them(tmp_path: Path) -> None:
    child = Path(__file__).parents[1].joinpath("mesh_child.py")
    done = subprocess.run([sys.executable, str(child), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
