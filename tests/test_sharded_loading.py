"""Loading straight to shards: every process reads its own bytes, and no process ever holds the whole model."""

from __future__ import annotations

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

from bicache_jax.checkpoint import SafetensorsFolder, paths, read_json, read_part, stored_names
from bicache_jax.convert import convert
from bicache_jax.models import FAMILIES, abstract

CHILD = str(Path(__file__).with_name("load_child.py"))
MIB = 2**20


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A LLaDA checkpoint of 132 MiB with random weights."""
    folder = tmp_path_factory.mktemp("big")
    fields = read_json(FOLDERS["llada"] / "config.json")
    fields |= {"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "n_layers": 4, "mlp_hidden_size": 2048}
    fields |= {"vocab_size": 16384, "embedding_size": 16384}
    (folder / "config.json").write_text(json.dumps(fields))
    config = FAMILIES["llada"].config_from_hf(fields, frozenset(), "config.json")
    rng = np.random.default_rng(0)
    tensors = {}
    mapping = FAMILIES["llada"].tensor_map(config)
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
def test_any_part_of_a_parameter_is_the_part_of_the_whole(data: st.DataObject) -> None:
    config, whole = model("llada")
    folder = FOLDERS["llada"]
    path, leaf = data.draw(st.sampled_from(list(paths(whole))))
    index = []
    for size in leaf.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    with SafetensorsFolder(folder) as tensors:
        names = stored_names(FAMILIES["llada"].tensor_map(config), path, leaf)
        part = read_part(tensors, names, path, leaf.dtype, tuple(index))
        np.testing.assert_array_equal(part, leaf[tuple(index)])
        assert tensors.bytes_read == part.nbytes
