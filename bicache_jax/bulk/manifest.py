"""What finished outputs were made from, so that a restart can tell whether they are its own.

A manifest is JSON, `{"format", "outputs": {name: entry}}`, with the fields of `Entry`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from bicache_jax.bulk.journal import OVERWRITE, check_same_run, header_of
from bicache_jax.bulk.storage import AnyPath, exists, faults, opened, read_bytes, write_whole
from bicache_jax.core.types import BicacheError, Record
from bicache_jax.core.version import release

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """What an output was made from.

    Attributes:
        run: everything that determines its results, by name.
        input: SHA-256 of the input, decompressed (of a bulk job's: `InputDigest`).
        requests: requests of the input, bad lines included.
        output: SHA-256 of the output.
        results: lines of the output.
        errors: those that are errors.
        versions: releases of the libraries that computed the last of it. They are noted, and not compared.
    """

    run: Mapping[str, Any]
    input: str
    requests: int
    output: str = ""
    results: int = 0
    errors: int = 0
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def with_output(self, path: AnyPath) -> Entry:
        """The entry with what is in an output, which is read."""
        digest, results, errors = hashlib.sha256(), 0, 0
        with faults(f"cannot read {path}"), opened(path) as lines:
            for line in lines:
                digest.update(line)
                results += 1
                errors += is_error(json.loads(line))
        versions = self.versions or _versions()
        return dataclasses.replace(self, output=digest.hexdigest(), results=results, errors=errors, versions=versions)


def _versions() -> dict[str, str]:
    return {name: found for name in ("bicache-jax", "jax", "jaxlib", "flax") if (found := release(name))}


def is_error(record: Record) -> bool:
    """Whether a line of an output says that its request failed, in our formats or in OpenAI's."""
    return record.get("finish_reason") == "error" or record.get("error") is not None


def read_manifest(path: AnyPath) -> dict[str, Entry]:
    """The entries of a manifest by name of the output; none where there is no manifest.

    Raises:
        BicacheError: it cannot be read, or is damaged.
    """
    with faults(f"cannot read {path}"):
        try:
            text = read_bytes(path)
        except Exception:  # bucket libraries raise many kinds
            if exists(path):
                raise
            return {}
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise BicacheError(f"{path} has format {found['format']}, this release reads {FORMAT}: {OVERWRITE}")
        return {name: Entry(**entry) for name, entry in found["outputs"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BicacheError(f"{path} is damaged: {OVERWRITE}") from None


def write_manifest(path: AnyPath, entries: Mapping[str, Entry], temporary: AnyPath | None = None) -> None:
    """Writes a manifest, whole or not at all."""
    outputs = {name: dataclasses.asdict(entry) for name, entry in sorted(entries.items())}
    text = json.dumps({"format": FORMAT, "outputs": outputs}, indent=1, ensure_ascii=False)
    write_whole(path, [text.encode("utf-8", "replace") + b"\n"], temporary)


def check_finished(path: AnyPath, output: AnyPath, entry: Entry | None, run: Mapping[str, Any], digest: str) -> Entry:
    """Checks that a finished output is this run's.

    Args:
        path: the manifest.
        output: the output.
        entry: what the manifest says of it; None if nothing.
        run: everything that determines this run's results.
        digest: SHA-256 of this run's input.

    Returns:
        The entry.

    Raises:
        BicacheError: nothing says what the output was made from, it was made from something else, or it was changed.
    """
    if entry is None:
        raise BicacheError(f"{output} is there, and {path} does not say what it was made from: {OVERWRITE}")
    check_same_run(path, header_of(entry.run), header_of(run), hint=f"repeat that command, or {OVERWRITE}")
    if entry.input != digest:
        raise BicacheError(f"{output} was made from another input, which was edited since: {OVERWRITE}")
    found = entry.with_output(output)
    if entry.output and found.output != entry.output:
        raise BicacheError(f"{output} was changed since it was written: {OVERWRITE}")
    return found


class InputDigest:
    """SHA-256 of the lines of an input that are not blank."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, line: bytes) -> None:
        """Takes the next line."""
        if line.strip():
            self._digest.update(line)

    def __str__(self) -> str:
        return self._digest.hexdigest()


def digest_of(lines: Iterable[bytes]) -> str:
    """The `InputDigest` of all these lines."""
    digest = InputDigest()
    for line in lines:
        digest.add(line)
    return str(digest)
