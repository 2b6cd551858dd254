"""A session: one model and its settings, and what a job does with them from the lines of a file to records.

Commands, the bulk job and whatever serves requests share it. It adds to the engine what they all need: requests read
line by line, prefixes settled among all of a job's requests, work divided, what determines results by name, and samples
that are left to run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.score import Estimate, Score
from bicache_jax.core.types import BicacheError, Key, Model, Record, Request, Result
from bicache_jax.core.version import version
from bicache_jax.serving.engine import Engine
from bicache_jax.serving.frames import SECONDS
from bicache_jax.serving.grouping import Row
from bicache_jax.serving.inputs import Requests, remaining
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.planner import cache_for
from bicache_jax.serving.requests import parsed_lines
from bicache_jax.serving.rounds import divide
from bicache_jax.serving.score_requests import ScoreRequest
from bicache_jax.serving.stats import Stats


class Session:
    """A model with the settings of a job."""

    def __init__(
        self,
        model: Model,
        *,
        cache: CacheConfig,
        sampling: SamplingConfig,
        batch_size: int | None = None,
        attention: str = "auto",
        mesh: Mesh | None = None,
        prefix_cache_dir: str | None = None,
    ) -> None:
        """Makes an engine; arguments and errors as `bicache_jax.Engine`."""
        cache = cache_for(model, cache)
        if cache.policy == "bicache" and cache.boundary == "auto" and cache.table is None:
            cache = dataclasses.replace(cache, table=model.boundaries)  # a journal names what was used
        self._engine = Engine(
            model,
            cache=cache,
            sampling=sampling,
            batch_size=batch_size,
            attention=attention,
            mesh=mesh,
            prefix_cache_dir=prefix_cache_dir,
        )
        self._parser = self._engine.parser()

    @property
    def stats(self) -> Stats:
        """The engine's counts."""
        return self._engine.stats

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._engine

    def iterate(self, lines: Iterable[bytes], source: str) -> Iterator[Request | Result]:
        """Tokenises lines one by one; a bad line becomes the result that says what is wrong with it."""
        return self._parser.lines(lines, source)

    def parse(self, requests: Requests) -> list[Request | Result]:
        """`iterate` over a whole file."""
        return list(self.iterate(requests.lines, requests.source))

    def plan(self, requests: Sequence[Request]) -> Plan:
        """What would be run."""
        return self._engine.plan(requests)

    def describe(self, requests: Sequence[Request]) -> str:
        """What would be run, for people."""
        return self.plan(requests).describe()

    def settle(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with the prefixes that they have among each other, whatever they are run with later."""
        rows = self._rows(requests)
        return [dataclasses.replace(request, prefix_len=rows[request.id][0].prefix_len) for request in requests]

    def divide(self, requests: Sequence[Request], parts: int) -> list[int]:
        """Divides settled requests by prefix into parts of equal work; returns the part of each."""
        rows = self._rows(requests)
        return divide(self._engine.model.config, self._engine.cache, [rows[request.id] for request in requests], parts)

    def _rows(self, requests: Sequence[Request]) -> dict[str, list[Row]]:
        """The rows of each request."""
        found: dict[str, list[Row]] = {}
        for row in self.plan(requests).rows:
            found.setdefault(row.request.id, []).append(row)
        return found

    def identity(self, requests: Requests) -> dict[str, Any]:
        """Everything that determines results, by the names the user knows."""
        engine, tokens = self._engine, hashlib.sha256()
        for request in requests.valid:
            tokens.update(json.dumps(dataclasses.astuple(request)).encode())
        return {
            **self.settings(),
            **dataclasses.asdict(engine.cache.with_blocks(engine.sampling, engine.model.config)),
            "input": requests.digest,
            "tokens": tokens.hexdigest(),  # the input through tokenizer and chat template
        }

    def settings(self) -> dict[str, Any]:
        """What determines results besides requests and their decoding settings, by the names the user knows."""
        engine = self._engine
        cache = dataclasses.asdict(engine.cache)
        if cache["table"] is not None:
            cache["table"] = {str(ratio): layers for ratio, layers in sorted(cache["table"].items())}
        if cache["batch_boundary"] == "min":  # only then do results depend on who is batched with whom
            cache["batch_size"] = engine.batch_size
        return {
            "version": version(),
            "model": engine.model.fingerprint,
            "dtype": str(engine.model.dtype),
            "mask_id": engine.model.config.mask_id,
            **cache,
        }

    def stream(
        self,
        requests: Sequence[Request],
        finished: Mapping[Key, Record],
        *,
        partial: bool,
        every: int | None = None,
        frame_seconds: float = SECONDS,
    ) -> Iterator[Record]:
        """Runs what is not finished.

        Args:
            requests: all requests that can run: a prefix is what a request shares with the others of the job, the
                finished ones included.
            finished: results there are already.
            partial: whether to yield unfinished results, too.
            every: as in `Engine.stream`.
            frame_seconds: likewise.

        Yields:
            Results as they happen, each with the time at which it came (`created`, seconds since 1970): a caller
            that keeps it writes the same lines after a restart. Unfinished ones have no finish reason.

        Raises:
            BicacheError: the device is out of memory.
        """
        if finished:
            requests = self.settle(requests)
        with _memory_named():
            while todo := remaining(requests, finished):
                first = {request.id: sample for request, sample in todo}
                left = [request for request, _ in todo]
                for result in self._engine.stream(left, partial=partial, every=every, frame_seconds=frame_seconds):
                    sample = result.sample + first[result.id]
                    yield {**result.to_record(), "sample": sample, "created": int(time.time())}
                finished = {**finished, **{(r.id, s + i): {} for r, s in todo for i in range(r.n)}}

    def read_scores(self, requests: Requests[ScoreRequest], estimate: Estimate) -> list[ScoreRequest | Result]:
        """Tokenises the lines of a file of texts to score; a bad line becomes the result that says what is wrong."""
        return list(parsed_lines(requests.lines, requests.source, self._engine.score_parser(estimate).parse))

    def score_identity(self, requests: Requests[ScoreRequest], estimate: Estimate) -> dict[str, Any]:
        """Everything that determines scores, by the names the user knows."""
        tokens = hashlib.sha256()
        for request in requests.valid:
            tokens.update(json.dumps(dataclasses.astuple(request)).encode())
        asked = {"input": requests.digest, "tokens": tokens.hexdigest()}
        return {**self.settings(), **dataclasses.asdict(estimate), **asked}

    def scores(
        self, requests: Sequence[ScoreRequest], estimate: Estimate, finished: Mapping[Key, Any]
    ) -> Iterator[Score]:
        """Scores what is not finished, with the prefixes that all have among each other.

        Raises:
            BicacheError: the device is out of memory.
        """
        scorer = self._engine.scorer(estimate)
        todo = [pair for pair in zip(requests, scorer.settle(requests), strict=True) if (pair[0].id, 0) not in finished]
        with _memory_named():
            yield from scorer.run([request for request, _ in todo], [prefix_len for _, prefix_len in todo])


@contextmanager
def _memory_named() -> Iterator[None]:
    """Says in a line that the device is out of memory, where it is.

    Raises:
        BicacheError: it is.
    """
    try:
        yield
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise BicacheError("the device is out of memory: choose a smaller batch size (--batch-size)") from error
