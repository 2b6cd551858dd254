"""Orbax folders: the same model, and every damage is noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import FOLDERS

from bicache_jax import BicacheError, load_model
from bicache_jax import convert as conversion
from bicache_jax.checkpoints.orbax_folder import checksum
from bicache_jax.cli import main
from bicache_jax.convert import convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The golden LLaDA checkpoint as an orbax folder."""
    folder = tmp_path_factory.mktemp("orbax") / "model"
    assert main(["convert", "--model", str(FOLDERS["llada"]), "--output", str(folder), "--quiet"]) == 0
    return folder


def equal(a, b) -> None:
    assert (a.config, a.fingerprint) == (b.config, b.fingerprint)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_both_ways_end_in_the_same_model(converted, tmp_path, monkeypatch):
    original = load_model(FOLDERS["llada"])
    equal(load_model(converted), original)
    half = load_model(converted, dtype="bfloat16").params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, original.params)
    monkeypatch.setattr(conversion, "FILE_BYTES", 400_000)
    convert(converted, tmp_path / "back", to="safetensors")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 4
    equal(load_model(tmp_path / "back"), original)


def test_the_bundled_model_with_its_tokenizer_and_table(tmp_path):
    convert("example", tmp_path / "model")
    original, converted = load_model("example"), load_model(tmp_path / "model")
    equal(converted, original)
    assert converted.boundaries == original.boundaries is not None
    assert converted.tokenizer.encode("which town") == original.tokenizer.encode("which town")


def test_generate_takes_the_folder(converted, tmp_path):
    requests = tmp_path / "in.jsonl"
    requests.write_text(json.dumps({"prompt_ids": list(range(10, 40))}) + "\n")
    flags = ["--input", str(requests), "--boundary", "2", "--gen-length", "4", "--quiet", "--no-compilation-cache"]
    for name, model in {"a": converted, "b": FOLDERS["llada"]}.items():
        assert main(["generate", "--model", str(model), "--output", str(tmp_path / name), *flags]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_checksum_notices_any_bit_and_any_exchange(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 5, 8), dtype)
    bits = np.asarray(x).view(np.uint16 if dtype == jnp.bfloat16 else np.uint32)
    right = int(checksum(x))
    places = range(0, bits.size, 7)
    for bit in range(bits.itemsize * 8):
        changed = bits.copy()
        for place in places:
            changed.flat[place] ^= bits.dtype.type(1 << bit)
            assert int(checksum(changed.view(x.dtype))) != right  # one element more each time, up to all of them
    assert int(checksum(x.at[0, 0, 0].set(x[1, 1, 1]).at[1, 1, 1].set(x[0, 0, 0]))) != right
    assert int(checksum(x.reshape(-1))) == right


def damage(folder: Path, file: str, change) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def flip(folder: Path) -> None:
    """Turns over a byte in the middle of the largest data file."""
    file = max(
        (path for path in (folder / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip, r"params: parameter [\w.]+ (is damaged|cannot be read)"),
        (lambda f: damage(f, "bicache.json", lambda m: m["params"]["head"].update(checksum=5)), "head is damaged"),
        (lambda f: damage(f, "bicache.json", lambda m: m.update(format=9)), "format 9 is not of this release"),
        (lambda f: damage(f, "bicache.json", lambda m: m.pop("tensors")), "bicache.json: damaged"),
        (lambda f: damage(f, "bicache.json", lambda m: m["params"].pop("head")), "missing head"),
        (
            lambda f: damage(f, "bicache.json", lambda m: m["params"]["head"].update(shape=[320, 63])),
            r"misshaped head: \[320, 63\], expected \[320, 64\]",
        ),
        (lambda f: damage(f, "config.json", lambda m: m.update(rope_theta=1.0)), "not the file that was converted"),
        (lambda f: (f / "config.json").unlink(), "without its config.json"),
        (
            lambda f: damage(f, "bicache.json", lambda m: m["params"]["head"].update(dtype="int16")),
            "unsupported head: int16, expected one of float32, bfloat16, float16, int8",
        ),
        (lambda f: shutil.rmtree(f / "params"), "cannot be read"),
    ],
)
def test_damage_is_one_line_that_says_where(converted, tmp_path, capfd, harm, message):
    folder = tmp_path / "model"
    shutil.copytree(converted, folder)
    harm(folder)
    with pytest.raises(BicacheError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert main(["convert", "--model", str(folder), "--output", str(tmp_path / "again")]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_output_that_is_there_is_not_touched(converted, tmp_path, capfd):
    (tmp_path / "mine").write_text("mine")
    for output in (tmp_path, tmp_path / "mine"):
        assert main(["convert", "--model", str(converted), "--output", str(output)]) == 2
        assert "exists already" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
