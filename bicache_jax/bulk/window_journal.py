"""One worker's journal of one window: on disk, and uploaded now and then where the output is in a bucket."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from typing import Any

from bicache_jax.bulk.journal import Journal, read_journal
from bicache_jax.bulk.storage import AnyPath, exists, faults, read_bytes, upload
from bicache_jax.core.types import BicacheError, Key, Record

UPLOAD_SECONDS = 30.0
"""Objects in buckets cannot be appended to: a journal is uploaded whole again, at most this often."""


class WindowJournal:
    """One worker's journal of one window.

    Attributes:
        finished: results that need not be computed again, by (id, sample): this worker's and the others'.
        errors: places of requests whose error is in the journal.
    """

    def __init__(self, journal: Journal, others: Mapping[Key, Record], target: AnyPath | None) -> None:
        self._journal = journal
        self._target = target
        self._uploaded = time.monotonic()
        found = {**others, **journal.finished}
        self.finished = {key: record for key, record in found.items() if record["finish_reason"] != "error"}
        self.errors = {record["index"] for record in found.values() if record["finish_reason"] == "error"}

    def begin(self, run: Mapping[str, Any]) -> None:
        """Checks that the journal is of this run, or writes its header."""
        self._journal.begin(run)

    def add(self, record: Record, *, index: int, of: int) -> None:
        """Writes a finished result.

        Args:
            record: the result.
            index: the place of its request in the window.
            of: results that the request has in all.
        """
        self._journal.add({**record, "index": index, "of": of})
        if self._target is not None and time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self._upload()

    def close(self) -> None:
        """Makes sure that everything is where a restart will look for it."""
        self._journal.close()
        if self._target is not None:
            self._upload()
            self._journal.path.unlink(missing_ok=True)

    def _upload(self) -> None:
        assert self._target is not None
        if self._journal.path.exists():  # a journal without results removes itself
            with faults(f"cannot write {self._target}"):
                upload(self._journal.path, self._target)
        self._uploaded = time.monotonic()


def read_window(path: AnyPath) -> tuple[Record, list[Record]]:
    """Reads a journal that may be another worker's, which removes it when its window ends without a result in it."""
    try:
        lines = read_bytes(path)
    except Exception:  # bucket libraries raise many kinds
        if exists(path):
            raise
        lines = b""
    header, records, _ = read_journal(io.BytesIO(lines), path)
    return header, [record for record in records if {"index", "of", "finish_reason"} <= record.keys()]


def in_order(samples: Mapping[int, Record], source: str) -> Iterator[Record]:
    """Yields the results of a request by sample, as users see them.

    Raises:
        BicacheError: some are missing.
    """
    records = [samples[sample] for sample in sorted(samples)]
    failed = any(record["finish_reason"] == "error" for record in records)
    if not failed and len(records) != (records[0]["of"] if records else 1):
        raise BicacheError(f"{source}: results are missing; run again with --resume")
    for record in records:
        yield {name: value for name, value in record.items() if name not in ("index", "of")}
