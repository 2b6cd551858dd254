"""Checkpoints as orbax folders: parameters stacked over layers, read one at a time and verified by checksums.

FOLDER/bicache.json     format, fingerprint, tensor names of the source, and shape, dtype and checksum per parameter
FOLDER/params/          the parameters (orbax, zarr3 in OCDBT), in chunks small enough to be read by shards
FOLDER/config.json, tokenizer files, boundary_table.json    unchanged
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from bicache_jax.checkpoints.fields import TensorMap, read_json
from bicache_jax.checkpoints.finite import WeightCheck
from bicache_jax.checkpoints.targets import Target
from bicache_jax.checkpoints.tree import Finish, as_it_is, paths, tree_of
from bicache_jax.core.config import QUANTIZE, Quantize
from bicache_jax.core.types import BicacheError

FORMAT = 1
MANIFEST = "bicache.json"
PARAMS = "params"
# A shard reads whole chunks. With one chunk per parameter every process would read everything.
CHUNK_BYTES = 4 << 20
_WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "int8")


@jax.jit
def checksum(x: Array) -> UInt32[Array, ""]:
    """A sum over an array's bits that does not depend on how it is sharded.

    Each element's bits and index are mixed into 32 bits, one to one in the element's bits, and added modulo 2**32. A
    change of one element is always detected. A change of several is missed in about one case in 2**32.

    Args:
        x: an array of 16- or 32-bit floats or 8-bit integers, on one device or many.

    Returns:
        The sum; equal on every process.
    """
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3, a bijection of 32-bit integers in which every bit of the input counts."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def is_orbax(folder: Path) -> bool:
    """Whether `bicache convert` wrote the folder."""
    return (folder / MANIFEST).is_file()


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise BicacheError("orbax folders need the extra: pip install 'bicache-jax[convert]'") from None
    return orbax.checkpoint


def _handler(orbax: Any) -> Any:
    return orbax.PyTreeCheckpointHandler(use_zarr3=True)


def write_params(
    folder: Path, params: Any, *, fingerprint: str, names: frozenset[str], quantize: Quantize = "none"
) -> None:
    """Writes parameters and the manifest into a folder that already contains `config.json`.

    Args:
        folder: an existing folder; the manifest is written last, so that an incomplete checkpoint is never loaded.
        params: the parameter tree, sharded or not.
        fingerprint: fingerprint of the source checkpoint.
        names: tensor names of the source checkpoint.
        quantize: format of the weights.
    """
    orbax = _orbax()
    save_args = jax.tree.map(lambda leaf: orbax.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with orbax.Checkpointer(_handler(orbax)) as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), args=orbax.args.PyTreeSave(params, save_args=save_args))
    manifest = {
        "format": FORMAT,
        "quantize": quantize,
        "fingerprint": fingerprint,
        "config_sha256": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "params": {
            ".".join(path): {"shape": leaf.shape, "dtype": leaf.dtype.name, "checksum": int(checksum(leaf))}
            for path, leaf in paths(params)
        },
        "tensors": sorted(names),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


class OrbaxFolder:
    """A checkpoint written by `bicache convert`.

    Attributes:
        folder: its path.
        names: tensor names of the source checkpoint; they show which biases exist.
        fingerprint: fingerprint of the source checkpoint.
        quantize: format of the weights.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the manifest.

        Raises:
            BicacheError: it has another format, is damaged, or belongs to another `config.json`.
        """
        self.folder = folder
        source = folder / MANIFEST
        manifest = read_json(source)
        if manifest.get("format") != FORMAT:
            raise BicacheError(
                f"{source}: format {manifest.get('format')!r} is not of this release, which reads {FORMAT}; convert the"
                " model again"
            )
        try:
            self.fingerprint = str(manifest["fingerprint"])
            formats: dict[str, Quantize] = {word: word for word in QUANTIZE}
            self.quantize = formats[str(manifest.get("quantize", "none"))]
            self.names = frozenset(map(str, manifest["tensors"]))
            self._params = {
                tuple(name.split(".")): (tuple(map(int, entry["shape"])), str(entry["dtype"]), int(entry["checksum"]))
                for name, entry in manifest["params"].items()
            }
            config = str(manifest["config_sha256"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BicacheError(
                f"{source}: damaged ({type(error).__name__}: {error}); convert the model again"
            ) from None
        try:
            found = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        except OSError as error:
            raise BicacheError(f"{folder / 'config.json'}: cannot be read ({error.strerror})") from None
        if found != config:
            raise BicacheError(f"{folder / 'config.json'}: not the file that was converted; convert the model again")

    def __enter__(self) -> OrbaxFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def mark(self, fields: Mapping[str, Any]) -> str:
        """The fingerprint of the source checkpoint."""
        return self.fingerprint

    def load(
        self, mapping: TensorMap, wanted: Mapping[str, Any], *, check: bool = False, finish: Finish = as_it_is
    ) -> dict[str, Any]:
        """Reads and verifies the parameters.

        Args:
            mapping: tensor names of the source checkpoint, for messages.
            wanted: a tree of `Target`.
            check: look for NaN and infinity.
            finish: what becomes of each parameter once it is loaded, before the next one is.

        Returns:
            The parameter tree.

        Raises:
            BicacheError: parameters are missing, extra, misshaped, damaged, or (if checked) not finite.
        """
        leaves = dict(paths(wanted))
        faults = [f"missing {'.'.join(path)}" for path in leaves if path not in self._params]
        faults += [f"extra {'.'.join(path)}" for path in self._params if path not in leaves]
        faults += [
            f"misshaped {'.'.join(path)}: {list(self._params[path][0])}, expected {list(leaf.shape)}"
            for path, leaf in leaves.items()
            if path in self._params and self._params[path][0] != leaf.shape
        ]
        faults += [
            f"unsupported {'.'.join(path)}: {dtype}, expected one of {', '.join(_WEIGHT_DTYPES)}"
            for path, (_, dtype, _) in self._params.items()
            if dtype not in _WEIGHT_DTYPES
        ]
        if faults:
            raise BicacheError(f"{self.folder}: parameters do not fit config.json: " + "; ".join(faults))
        weights = WeightCheck(self.folder, wanted=check)

        def load(path: tuple[str, ...], array: jax.Array) -> jax.Array:
            leaf = leaves[path]
            named = mapping.stored(path, leaf.shape) if path in mapping.names else [".".join(path)]
            return weights.look(leaf.expand(array.astype(leaf.dtype)), named)

        params = tree_of(found for path, array in self._read(leaves) for found in finish(path, load(path, array)))
        weights.finish()
        return params

    def verify(self) -> None:
        """Reads everything once, one parameter at a time.

        Raises:
            BicacheError: a parameter is damaged.
        """
        for _ in self._read({path: Target(shape, dtype) for path, (shape, dtype, _) in self._params.items()}):
            pass

    def _read(self, leaves: Mapping[tuple[str, ...], Target]) -> Iterator[tuple[tuple[str, ...], jax.Array]]:
        """Yields verified parameters in their stored dtype, one by one, so that a cast never doubles the memory."""
        orbax = _orbax()
        from etils import epath

        handler = _handler(orbax)
        stored = epath.Path((self.folder / PARAMS).absolute())
        try:
            for path, leaf in leaves.items():
                shape, dtype, expected = self._params[path]
                here = leaf.sharding or jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
                if leaf.is_padded and isinstance(here, jax.sharding.NamedSharding):  # split after padding
                    here = jax.sharding.NamedSharding(here.mesh, jax.sharding.PartitionSpec())
                arguments = orbax.ArrayRestoreArgs(sharding=here, global_shape=shape, dtype=jnp.dtype(dtype))
                try:
                    tree = handler.restore(
                        stored,
                        args=orbax.args.PyTreeRestore(
                            item=tree_of([(path, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))]),
                            restore_args=tree_of([(path, arguments)]),
                            partial_restore=True,
                        ),
                    )
                    [(_, array)] = paths(tree)
                    found = int(checksum(array))
                except Exception as error:  # orbax and tensorstore raise many types; the first line has the reason
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    raise BicacheError(
                        f"{stored}: parameter {'.'.join(path)} cannot be read ({reason}); convert the model again"
                    ) from None
                if found != expected:
                    raise BicacheError(
                        f"{stored}: parameter {'.'.join(path)} is damaged: checksum {found}, written with {expected};"
                        " convert the model again"
                    )
                yield path, array
        finally:
            handler.close()
