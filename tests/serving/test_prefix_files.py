"""Encoded prefixes on disk: found by later processes, and never anything but what was asked for."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import golden
import jax.numpy as jnp
import numpy as np
import pytest

from bicache_jax import BicacheError, CacheConfig, Engine, Model, Request, SamplingConfig, load_model
from bicache_jax.cli import main
from bicache_jax.loading import random_model
from bicache_jax.serving.placement import Piece
from bicache_jax.serving.prefix_files import PrefixFiles
from bicache_jax.serving.store import Key

SYSTEM = tuple(range(20, 60))
WORK = [Request(name, (*SYSTEM, last), 40, SamplingConfig(8, 4)) for name, last in (("a", 70), ("b", 71))]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(golden.FOLDERS["llada"])


def engine(model: Model, folder: Path | None, **more: Any) -> Engine:
    """A new engine, as another process would make it."""
    return Engine(model, cache=CacheConfig(boundary=2, refresh_interval=2), prefix_cache_dir=folder, **more)


def test_a_later_engine_encodes_nothing_and_gives_the_same_results(model: Model, tmp_path: Path) -> None:
    plain = engine(model, None).generate(WORK)
    first = engine(model, tmp_path)
    assert first.generate(WORK) == plain and first.stats.prefixes_encoded == 1
    second = engine(model, tmp_path)
    assert second.generate(WORK) == plain
    assert second.stats.prefixes_encoded == 0 and second.prefixes.stats.disk_hits == 1
    for namespace, encoded in (("b", 1), ("", 0)):
        other = engine(model, tmp_path, namespace=namespace, attention="xla")  # what serves on CPUs
        assert other.generate(WORK) == plain and other.stats.prefixes_encoded == encoded
    deeper = Engine(model, cache=CacheConfig(boundary=3, refresh_interval=2), prefix_cache_dir=tmp_path)
    deeper.generate(WORK)
    assert deeper.stats.prefixes_encoded == 1, "it was not encoded for that boundary"


def test_in_8_bits_they_are_kept_on_the_device_on_disk_and_in_the_host_s_memory(model: Model, tmp_path: Path) -> None:
    """As many bytes as planned: a quarter of float32, and the scales."""
    small = CacheConfig(boundary=2, refresh_interval=2, cache_dtype="int8")
    first = Engine(model, cache=small, prefix_cache_dir=tmp_path)
    wanted = first.generate(WORK)
    [(key, entry)] = first._store._entries.items()
    k, k_scales, v, v_scales, hidden, *_ = (leaf for (leaf,) in entry.piece.leaves)
    numbers = key.layers * model.config.num_kv_heads * key.length * model.config.head_dim
    assert k.nbytes == v.nbytes == numbers and k_scales.nbytes == v_scales.nbytes == 4 * numbers // 16
    assert first.prefixes.stats.nbytes == k.nbytes + k_scales.nbytes + v.nbytes + v_scales.nbytes + hidden.nbytes
    second = Engine(model, cache=small, prefix_cache_dir=tmp_path, prefix_cache_bytes=0, prefix_host_bytes=2**20)
    for hits in ((1, 0), (1, 1)):  # without room on the device it goes on to the host's memory
        assert [one.token_ids for one in second.generate(WORK)] == [one.token_ids for one in wanted]
        stats = second.prefixes.stats
        assert second.stats.prefixes_encoded == 0 and (stats.disk_hits, stats.host_hits) == hits


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-7],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"x" * len(data),
    ],
    ids=["end", "half", "empty", "bit", "noise"],
)
def test_a_damaged_file_is_not_used(model: Model, tmp_path: Path, damage: Any) -> None:
    files, key, piece = stored(tmp_path)
    files.save(key, piece, {1})
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="is not used"):
        assert files.load(key, {1}) is None
    assert not path.exists()
    files.save(key, piece, {1})
    assert files.load(key, {1}) is not None


def stored(folder: Path, **identity: str) -> tuple[PrefixFiles, Key, Piece]:
    """A folder, and what is put into it."""
    leaves = [jnp.full((2, 1, 2, 4, 8), 0.3, "bfloat16")] * 2 + [jnp.ones((1, 1, 4, 16), "bfloat16")]
    piece = Piece(tuple((leaf,) for leaf in [*leaves, jnp.asarray([1]), jnp.asarray([3])]))
    return PrefixFiles(folder, {"model": "m", "dtype": "bfloat16"} | identity), Key(0, (5, 6, 7), 4, 2, 1), piece


def test_what_is_read_is_what_was_written_and_of_the_same_key(tmp_path: Path) -> None:
    files, key, piece = stored(tmp_path)
    files.save(key, piece, {1})
    found = files.load(key, {1})
    assert found is not None and found[1] == {1}
    for (wanted,), (leaf,) in zip(piece.leaves, found[0].leaves, strict=True):
        assert leaf.dtype == wanted.dtype
        np.testing.assert_array_equal(leaf, wanted)
    identity = {"model": "m", "dtype": "bfloat16"}
    assert PrefixFiles(tmp_path, identity, cache_dtype="int8").load(key, {1}) is None, "it keeps other arrays"
    assert files.load(key, {2}) is None and files.load(key._replace(tokens=(5, 6, 8)), {1}) is None
    (path,) = tmp_path.glob("*.safetensors")
    other = key._replace(tokens=(9, 9, 9))
    path.rename(files._path(other))  # as if two keys had one name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert files.load(other, {1}) is None, "its tokens are inside"
    assert stored(tmp_path, model="other")[0].load(key, {1}) is None


def test_a_folder_stays_within_its_limit_and_a_torn_write_is_nothing(tmp_path: Path) -> None:
    files, key, piece = stored(tmp_path)
    files.save(key, piece, {1})
    size = next(tmp_path.glob("*.safetensors")).stat().st_size
    small = PrefixFiles(tmp_path, {"model": "m", "dtype": "bfloat16"}, limit=3 * size)
    (tmp_path / "abc.tmp").write_bytes(b"half of a file")  # what a kill leaves
    for token in range(6):
        small.save(key._replace(tokens=(token,)), piece, {1})
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert small.load(key._replace(tokens=(5,)), {1}) is not None


def test_what_cannot_be_kept_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BicacheError, match="prefix_cache_dir .*file: cannot be written"):
        engine(model, tmp_path / "file")
    with pytest.raises(BicacheError, match="needs a model with a fingerprint"):
        Engine(random_model("small"), cache=CacheConfig(boundary=2), prefix_cache_dir=tmp_path)


def test_the_command_takes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"id": f"{i}", "prompt_ids": [*SYSTEM, 70 + i], "prefix_len": 40} for i in range(2)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = ["generate", "--model", str(golden.FOLDERS["llada"]), "--boundary", "2", "--gen-length", "8"]
    run += ["--input", str(tmp_path / "in.jsonl"), "--no-compilation-cache", "--quiet"]
    run += ["--prefix-cache", str(tmp_path / "kept")]
    assert main([*run, "--output", str(tmp_path / "a.jsonl")]) == 0
    assert main([*run, "--output", str(tmp_path / "b.jsonl")]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len(list((tmp_path / "kept").iterdir())) == 1
    capsys.readouterr()
    assert main([*run[:-1], str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "c.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("bicache: error: --prefix-cache ")


WRITER = """
import itertools, sys, numpy as np
from bicache_jax.serving.placement import Piece
from bicache_jax.serving.prefix_files import PrefixFiles
from bicache_jax.serving.store import Key
files = PrefixFiles(sys.argv[1], {"model": "m", "dtype": "float32"})
for number in itertools.count():
    key = Key(0, (number % 8, 5), 64, 2, 1)
    kv, hidden = np.full((2, 1, 4, 64, 32), number % 8, np.float32), np.full((1, 1, 64, 128), number % 8, np.float32)
    files.save(key, Piece(tuple((leaf,) for leaf in (kv, kv, hidden, np.asarray([1]), np.asarray([2])))), {1})
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.full)])
def test_writers_that_are_killed_leave_whole_files_or_none(tmp_path: Path, times: int) -> None:
    chance = random.Random(0)
    files = PrefixFiles(tmp_path, {"model": "m", "dtype": "float32"})
    for _ in range(times):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline()
        time.sleep(chance.random() / 10)
        writer.kill()
        writer.communicate()
        found = [files.load(Key(0, (number, 5), 64, 2, 1), {1}) for number in range(8)]  # a warning is an error here
        assert found[0] is not None
        for number, one in enumerate(found):
            assert one is None or all(np.all(np.asarray(leaf) == number) for (leaf,) in one[0].leaves[:3])
    left = tmp_path / "killed.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    _, key, piece = stored(tmp_path)
    files.save(key, piece, {1})
    assert not left.exists()
