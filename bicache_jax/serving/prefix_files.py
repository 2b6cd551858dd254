"""Encoded prefixes on disk, shared by processes and by those that come later.

A file holds one encoding, its tokens and a checksum, and appears whole. What is not what was asked for (of another
model, damaged, cut short) is not used; it is never an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from bicache_jax.core.config import CacheDtype
from bicache_jax.core.types import BicacheError, Model
from bicache_jax.core.version import version
from bicache_jax.serving.placement import Piece, Placement
from bicache_jax.serving.store import Key
from bicache_jax.sharding import prefix_specs

LIMIT = 8 * 2**30
"""Bytes of a folder."""
FORMAT = "1"
_SUFFIX = ".prefix.safetensors"
_UNFINISHED = ".tmp"
_ABANDONED = 600.0  # seconds after which nobody writes a file any more


class PrefixFiles:
    """A folder of encoded prefixes.

    Attributes:
        folder: where they are.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, str],
        limit: int = LIMIT,
        cache_dtype: CacheDtype = "auto",
    ) -> None:
        """Makes the folder, if need be.

        Args:
            folder: where the files are.
            identity: what encodings depend on besides the tokens, `dtype` among it; a file of another identity is never
                served.
            limit: bytes of all files; those not used for longest go first.
            cache_dtype: how KV are kept; what is kept otherwise is of another identity.

        Raises:
            BicacheError: it cannot be written there.
        """
        self.folder = Path(folder).expanduser()
        kept = {} if cache_dtype == "auto" else {"cache_dtype": cache_dtype}
        self._identity = {"format": FORMAT, "version": version(), **identity, **kept}
        self._cache_dtype, self._dtype = cache_dtype, jnp.dtype(identity["dtype"])
        paths, _ = jax.tree.flatten_with_path(prefix_specs(cache_dtype))
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        self._limit = limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise BicacheError(f"prefix_cache_dir {folder}: cannot be written ({error.strerror})") from None

    def load(self, key: Key, boundaries: Collection[int]) -> tuple[Piece, frozenset[int]] | None:
        """An encoding that serves all these boundaries, and what it serves; None if there is none."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            found = self._read(data, key)
        except (SafetensorError, ValueError, KeyError, TypeError) as fault:
            warnings.warn(f"{path} is not used: {fault or type(fault).__name__}", stacklevel=2)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        if found is None or not found[1].issuperset(boundaries):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # what is used stays
        return found

    def save(self, key: Key, piece: Piece, boundaries: Collection[int]) -> None:
        """Writes an encoding, whole or not at all; a full disk costs a warning."""
        arrays = {name: np.asarray(leaf) for name, (leaf,) in zip(self._names, piece.leaves, strict=True)}
        for name, array in arrays.items():
            if array.dtype == self._dtype:  # the library of the format does not read all of them back
                arrays[name] = array.view(f"u{array.dtype.itemsize}")
        arrays["tokens"] = np.asarray(key.tokens, np.int32)
        arrays["served"] = np.asarray(sorted(boundaries), np.int32)
        data = save(arrays, metadata={**self._metadata(key), "checksum": _checksum(arrays)})
        path = self._path(key)
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=_UNFINISHED, delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            warnings.warn(f"{path} was not written: {error.strerror}", stacklevel=2)
        self._shrink()

    def _metadata(self, key: Key) -> dict[str, str]:
        sizes = f"{key.length},{key.layers},{key.slots}"
        return {**self._identity, "sizes": sizes, **({"within": key.namespace} if key.namespace else {})}

    def _path(self, key: Key) -> Path:
        named = hashlib.sha256(json.dumps([self._metadata(key), key.tokens], sort_keys=True).encode())
        return self.folder / f"{named.hexdigest()[:40]}{_SUFFIX}"

    def _read(self, data: bytes, key: Key) -> tuple[Piece, frozenset[int]] | None:
        """What is in a file; None if it is another key's.

        Raises:
            ValueError: it is damaged.
        """
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        arrays = load(data)
        if metadata.pop("checksum") != _checksum(arrays):
            raise ValueError("its checksum differs")
        if metadata != self._metadata(key) or tuple(arrays["tokens"].tolist()) != key.tokens:
            return None
        leaves = (arrays[name] for name in self._names)
        leaves = (leaf.view(self._dtype) if leaf.dtype.kind == "u" else leaf for leaf in leaves)
        piece = Piece(tuple((jnp.asarray(leaf),) for leaf in leaves), self._cache_dtype)
        return piece, frozenset(map(int, arrays["served"]))

    def _shrink(self) -> None:
        """Removes the files that were not used for longest, until the rest is within the limit.

        And what a process left behind that was killed while it wrote.
        """
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob(f"*{_UNFINISHED}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError):  # another process may remove it
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._limit:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def open_files(
    folder: str | Path,
    model: Model,
    placement: Placement,
    *,
    attention: Any,
    namespace: str,
    cache_dtype: CacheDtype = "auto",
) -> PrefixFiles:
    """The folder of an engine.

    Args:
        folder: where the files are.
        model: the model.
        placement: where it runs.
        attention: the implementation of attention that it runs with.
        namespace: the engine's.
        cache_dtype: how KV are kept.

    Raises:
        BicacheError: the folder cannot be written, there is a mesh, or the model has no fingerprint.
    """
    if placement.mesh is not None:
        raise BicacheError("prefix_cache_dir is for one device, and there is a mesh: leave one of them out")
    if not model.fingerprint:
        raise BicacheError("prefix_cache_dir needs a model with a fingerprint, as load_model gives it")
    identity = {
        "model": model.fingerprint,
        "dtype": str(model.dtype),
        "device": placement.devices[0].device_kind,
        "attention": repr(attention),
        "namespace": namespace,
    }
    return PrefixFiles(folder, identity, cache_dtype=cache_dtype)


def _checksum(arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
