"""The engine: requests in, results out, each prefix encoded once.

    requests -> prefixes -> boundaries -> batches -> encode prefix -> intervals -> results

What runs on the device are two programs, `encode` and `decode`; everything here is bookkeeping between them.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bicache_jax.backbone import Backbone
from bicache_jax.batch import build_rows, join_prefixes
from bicache_jax.boundary import boundary_at
from bicache_jax.buckets import length_bucket, width_bucket
from bicache_jax.cache import PrefixCache, Rows
from bicache_jax.compilation import CompileCounter
from bicache_jax.config import CACHED_BLOCK, CacheConfig, SamplingConfig
from bicache_jax.encode import encode
from bicache_jax.functional import backbone_for
from bicache_jax.grouping import Batch, Row, detect_prefixes, plan_batches, prefix_ratio
from bicache_jax.interval import decode, empty_suffix
from bicache_jax.plan import Buffers, Plan
from bicache_jax.requests import parse_requests
from bicache_jax.schedule import make_decoding, most_steps, window_size
from bicache_jax.types import BicacheError, Model, Request, Result


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine has done so far.

    Attributes:
        rows: responses finished (a request with n samples counts n).
        tokens: response tokens made.
        forward_passes: forward passes over rows, encoding not counted.
        prefixes_encoded: prefixes run alone.
        prefix_hits: rows that were served by a prefix encoded for an earlier row.
        batches: batches run.
        dispatches: calls of the decode program.
        compilations: programs compiled in the process since the engine was made.
        compile_seconds: time spent on that.
        seconds: time spent in encode and decode, compilation included.
    """

    rows: int = 0
    tokens: int = 0
    forward_passes: int = 0
    prefixes_encoded: int = 0
    prefix_hits: int = 0
    batches: int = 0
    dispatches: int = 0
    compilations: int = 0
    compile_seconds: float = 0.0
    seconds: float = 0.0


class Engine:
    """Runs requests on a model.

    A request's tokens never depend on its batch: not on neighbours, padding, order or batch size (with
    `batch_boundary="min"` the boundary does). They do depend on its prefix; where that is not given, it is what the
    request shares with the other requests of the same call.
    """

    def __init__(
        self,
        model: Model,
        *,
        cache: CacheConfig | None = None,
        sampling: SamplingConfig | None = None,
        batch_size: int | None = None,
        attention: str = "auto",
        mesh: Any = None,
    ) -> None:
        """Makes an engine.

        Args:
            model: from `load_model`.
            cache: how prefixes are reused; the default is BiCache with the model's own boundary table.
            sampling: how canvases are denoised, unless a request says otherwise.
            batch_size: most rows of a batch; None: planned from the shapes.
            attention: implementation of prefix attention.
            mesh: reserved; must be None.

        Raises:
            BicacheError: there is no boundary table for the model, or the boundary is deeper than the model.
        """
        if mesh is not None:
            raise BicacheError("mesh: sharded engines are not available in this version; leave it out")
        if batch_size is not None and batch_size < 1:
            raise BicacheError(f"batch_size must be >= 1, got {batch_size}")
        self.model = model
        self.cache = cache or CacheConfig()
        self.sampling = sampling or SamplingConfig()
        self.batch_size = batch_size
        self._backbone = backbone_for(model.config, attention)
        self._boundary_of = self._boundary_rule()
        self._compiles = CompileCounter()
        self._stats = Stats()

    @property
    def stats(self) -> Stats:
        """What has been done so far."""
        return dataclasses.replace(
            self._stats, compilations=self._compiles.count, compile_seconds=self._compiles.seconds
        )

    def generate(self, requests: Iterable[Request | Result | Mapping[str, Any]]) -> list[Result]:
        """Answers requests.

        Args:
            requests: parsed requests, or objects as in a request file; an error `Result` passes through.

        Returns:
            Results in the order of the requests, samples of a request in order.
        """
        answers = sorted(self._answer(self._admit(requests), partial=False), key=lambda answer: answer[:2])
        return [result for _, _, result in answers]

    def stream(
        self, requests: Iterable[Request | Result | Mapping[str, Any]], *, partial: bool = True
    ) -> Iterator[Result]:
        """Answers requests as they finish.

        Args:
            requests: as in `generate`.
            partial: yield every row at each interval edge too, its canvas as it stands (mask tokens where it is
                undecided) and `finish_reason` None.

        Yields:
            Results, errors first, then in the order of completion.
        """
        for _, _, result in self._answer(self._admit(requests), partial=partial):
            yield result

    def plan(self, requests: Iterable[Request | Result | Mapping[str, Any]]) -> Plan:
        """What `generate` would do; nothing is run."""
        return self._plan([entry for entry in self._admit(requests) if isinstance(entry, Request)])

    def _admit(self, requests: Iterable[Request | Result | Mapping[str, Any]]) -> list[Request | Result]:
        entries = list(requests)
        parsed = [entry for entry in entries if isinstance(entry, Request | Result)]
        if len(parsed) == len(entries):  # also what `parse_requests` returns
            return [
                dataclasses.replace(entry, index=place) if isinstance(entry, Request) else entry
                for place, entry in enumerate(parsed)
            ]
        if parsed:
            raise TypeError("requests must be all parsed (Request) or all raw (mappings)")
        raw = [entry for entry in entries if not isinstance(entry, Request | Result)]
        model, sampling = self.model, self.sampling
        open_block = sampling.block_length is None and self.cache.block_cache != "off"
        return parse_requests(
            raw,
            config=model.config,
            tokenizer=model.tokenizer,
            sampling=sampling,
            source="requests",
            auto_block=CACHED_BLOCK if open_block else None,
        )

    def _boundary_rule(self) -> Callable[[int], int]:
        """Boundary by prefix ratio."""
        cache, num_layers = self.cache, self.model.config.num_layers
        if cache.policy == "none":
            return lambda ratio: 0
        if cache.boundary != "auto":
            boundary = cache.boundary
            if boundary > num_layers:
                raise BicacheError(f"boundary: {boundary} is deeper than the model's {num_layers} layers")
            return lambda ratio: boundary
        if cache.policy == "naive":
            return lambda ratio: num_layers
        table = cache.table if cache.table is not None else self.model.boundaries
        if table is None:
            raise BicacheError(
                f"{self.model.name or 'model'}: no boundary table belongs to it; make one with 'bicache profile', "
                "or give a boundary"
            )
        if table is self.model.boundaries and self.model.note:
            warnings.warn(self.model.note, UserWarning, stacklevel=3)
        deepest = max(table.values(), default=0)
        if deepest > num_layers:
            raise BicacheError(f"boundary table: boundary {deepest} is deeper than the model's {num_layers} layers")
        return lambda ratio: boundary_at(table, ratio)

    def _rows(self, requests: Sequence[Request]) -> list[Row]:
        """Requests as rows: prefix found, boundary chosen."""
        lengths: Sequence[int] = [0] * len(requests)
        if self.cache.policy != "none":
            lengths = detect_prefixes(
                requests, min_prefix=self.cache.min_prefix, min_suffix=int(self.model.config.shift_logits)
            )
        rows = []
        for request, prefix_len in zip(requests, lengths, strict=True):
            ratio = prefix_ratio(prefix_len, len(request.prompt_ids) + request.sampling.gen_length)
            boundary = self._boundary_of(ratio) if prefix_len else 0
            rows += [Row(request, sample, prefix_len, ratio, boundary) for sample in range(request.n)]
        return rows

    def _plan(self, requests: Sequence[Request]) -> Plan:
        batches = plan_batches(
            self._rows(requests), batch_size=self.batch_size, batch_boundary=self.cache.batch_boundary
        )
        config = self.model.config
        dtype = jnp.dtype(self.model.params["embed"].dtype)
        return Plan(config, dtype, self.cache, tuple(batches), Buffers.of(batches, config.num_layers))

    def _answer(self, entries: Sequence[Request | Result], *, partial: bool) -> Iterator[tuple[int, int, Result]]:
        """Yields (place, sample, result)."""
        for place, entry in enumerate(entries):
            if isinstance(entry, Result):
                yield place, entry.sample, entry
        places = {id(entry): place for place, entry in enumerate(entries)}
        plan = self._plan([entry for entry in entries if isinstance(entry, Request)])
        store = _PrefixStore(plan)
        for batch in plan.batches:
            for row, result in self._run(batch, plan, store, partial):
                yield places[id(row.request)], row.sample, result

    def _run(self, batch: Batch, plan: Plan, store: _PrefixStore, partial: bool) -> Iterator[tuple[Row, Result]]:
        """Runs a batch to its end; between dispatches its state is tokens, counters and keys."""
        started = time.perf_counter()
        config = self.model.config
        *_, num_rows, length = plan.shape(batch)
        sampling = batch.rows[0].request.sampling
        prefixes = self._prefixes(batch, plan, store)
        rows = build_rows(
            [(row.request, row.sample, row.prefix_len) for row in batch.rows],
            batch.prefix_index,
            config,
            num_rows=num_rows,
            length=length,
        )
        block_steps = sampling.num_steps // sampling.num_blocks
        decoding = make_decoding(
            config,
            sampling,
            batch.boundary,
            self.cache.refresh_interval,
            block_cache=self.cache.block_cache,
            room=length_bucket(block_steps),
        )
        state = (rows, empty_suffix(self._backbone, rows, plan.dtype, block_cache=self.cache.block_cache != "off"))
        while True:
            window, stop_block = self._window(sampling, state[0])
            state = decode(
                self._backbone,
                self.model.params,
                prefixes,
                state,
                decoding,
                jnp.asarray(1 if partial else most_steps(sampling), jnp.int32),
                jnp.asarray(stop_block, jnp.int32),
                block_width=width_bucket(sampling.block_size),
                deep_layers=plan.buffers.deep,
                window=min(window, length),
            )
            rows = state[0]
            seen = jax.device_get((rows.tokens, rows.step, rows.forward_passes, rows.done))
            finished = bool(seen[3].all())
            self._count(dispatches=1, seconds=time.perf_counter() - started)
            if finished:
                break
            if partial:
                yield from self._results(batch, seen, finished=False)
            started = time.perf_counter()
        self._count(
            batches=1,
            rows=len(batch.rows),
            tokens=len(batch.rows) * sampling.gen_length,
            forward_passes=int(seen[2].sum()),
        )
        yield from self._results(batch, seen, finished=True)

    def _window(self, sampling: SamplingConfig, rows: Rows) -> tuple[int, int]:
        """Tokens that steps inside a block run, and the block at which that number changes."""
        if self.cache.block_cache != "prefix":
            return window_size(sampling, self.cache.block_cache, 0) and width_bucket(
                sampling.block_size
            ), sampling.num_blocks
        block, done = jax.device_get((rows.block, rows.done))
        earliest = int(block[~done].min())
        return window_size(sampling, "prefix", earliest), earliest + 1

    def _prefixes(self, batch: Batch, plan: Plan, store: _PrefixStore) -> PrefixCache:
        """The batch's prefixes as one cache; each is encoded when it is first needed and kept for its last batch."""
        groups, length, _, _ = plan.shape(batch)
        caches = []
        for prefix in batch.prefixes:
            cache = store.get(prefix)
            if cache is None:
                cache = encode_padded(
                    self._backbone, self.model.params, prefix, store.boundaries(prefix), plan.buffers, length
                )
                store.put(prefix, cache)
                self._count(prefixes_encoded=int(bool(prefix)), prefix_hits=-int(bool(prefix)))
            caches.append(cache)
        self._count(prefix_hits=sum(row.prefix_len > 0 for row in batch.rows))
        store.release(batch)
        boundary = jnp.asarray(min(batch.boundary, self.model.config.num_layers - 1), jnp.int32)
        return join_prefixes(tuple(caches + caches[:1] * (groups - len(caches))), boundary)

    def _results(self, batch: Batch, state: Sequence[np.ndarray], *, finished: bool) -> Iterator[tuple[Row, Result]]:
        config, tokenizer = self.model.config, self.model.tokenizer
        front = int(config.shift_logits)
        for place, row in enumerate(batch.rows):
            tokens = tuple(int(token) for token in state[0][place, front : front + row.request.sampling.gen_length])
            ends = [place for place, token in enumerate(tokens) if token in config.eos_ids]
            text = None
            if tokenizer is not None:
                text = tokenizer.canvas(tokens[: ends[0] if ends else None], config.mask_id)
            yield (
                row,
                Result(
                    id=row.request.id,
                    sample=row.sample,
                    token_ids=tokens,
                    text=text,
                    finish_reason=("stop" if ends else "length") if finished else None,
                    prefix_len=row.prefix_len,
                    prefix_ratio=row.ratio,
                    boundary=batch.boundary,
                    refresh_interval=self.cache.refresh_interval,
                    steps=int(state[1][place]),
                    forward_passes=int(state[2][place]),
                    masked=() if finished else tuple(i for i, token in enumerate(tokens) if token == config.mask_id),
                ),
            )

    def _count(self, **more: float) -> None:
        now = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = dataclasses.replace(self._stats, **now)


def encode_padded(
    backbone: Backbone, params: Any, prefix: tuple[int, ...], boundaries: Sequence[int], buffers: Buffers, length: int
) -> PrefixCache:
    """Encodes one prefix in its bucket, `length` tokens long, for the boundaries that its rows use."""
    ids = np.zeros((1, length), np.int32)
    ids[0, : len(prefix)] = prefix
    slots = np.full(buffers.slots, backbone.config.num_layers, np.int32)
    slots[: len(boundaries)] = boundaries
    return encode(
        backbone,
        params,
        jnp.asarray(ids),
        jnp.asarray([len(prefix)], jnp.int32),
        jnp.asarray(slots),
        num_layers=buffers.shallow,
    )


class _PrefixStore:
    """Caches of encoded prefixes, each held from its first batch to its last. The engine's only mutable state."""

    def __init__(self, plan: Plan) -> None:
        last = plan.config.num_layers - 1
        self._caches: dict[tuple[int, ...], PrefixCache] = {}
        self._uses = Counter(prefix for batch in plan.batches for prefix in batch.prefixes)
        self._boundaries: dict[tuple[int, ...], set[int]] = {}
        for batch in plan.batches:
            for prefix in batch.prefixes:
                self._boundaries.setdefault(prefix, set()).add(min(batch.boundary, last))

    def boundaries(self, prefix: tuple[int, ...]) -> list[int]:
        """Boundaries at which the prefix is used in this run."""
        return sorted(self._boundaries[prefix])

    def get(self, prefix: tuple[int, ...]) -> PrefixCache | None:
        return self._caches.get(prefix)

    def put(self, prefix: tuple[int, ...], cache: PrefixCache) -> None:
        self._caches[prefix] = cache

    def release(self, batch: Batch) -> None:
        """Drops the prefixes whose last batch this was."""
        for prefix in batch.prefixes:
            self._uses[prefix] -= 1
            if not self._uses[prefix]:
                del self._caches[prefix]
