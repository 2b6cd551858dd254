"""The engine: requests in, results out, each prefix encoded once.

    requests -> prefixes -> boundaries -> batches -> encode prefix -> intervals -> results

What runs on the device are two programs, `encode` and `decode`; everything here is bookkeeping between them.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bicache_jax.batch import join_prefixes, lay_out
from bicache_jax.boundary import boundary_at
from bicache_jax.buckets import length_bucket, width_bucket
from bicache_jax.cache import PrefixCache, Rows
from bicache_jax.compilation import CompileCounter
from bicache_jax.config import CACHED_BLOCK, CacheConfig, SamplingConfig
from bicache_jax.encode import encode
from bicache_jax.functional import backbone_here, room_of
from bicache_jax.grouping import Row, detect_prefixes, prefix_ratio
from bicache_jax.interval import decode
from bicache_jax.memory import Buffers, params_bytes
from bicache_jax.placement import Placement
from bicache_jax.plan import Plan, rows_fitting
from bicache_jax.requests import parse_requests
from bicache_jax.rounds import Round, plan_rounds
from bicache_jax.schedule import make_decoding, most_steps, passes_saved, stages
from bicache_jax.sharding import check_mesh
from bicache_jax.store import PrefixStore
from bicache_jax.types import BicacheError, Model, Request, Result


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine has done so far.

    Attributes:
        rows: responses finished (a request with n samples counts n).
        tokens: response tokens made.
        forward_passes: forward passes over rows, encoding not counted; under guidance a row's pass runs its twin too.
        passes_saved: forward passes that early stops spared by schedule; without one, at least as many were spared.
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
    passes_saved: int = 0
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
        mesh: Mesh | None = None,
    ) -> None:
        """Makes an engine.

        Args:
            model: from `load_model`.
            cache: how prefixes are reused; the default is BiCache with the model's own boundary table.
            sampling: how canvases are denoised, unless a request says otherwise.
            batch_size: most rows of a batch (on a mesh: of each data shard's); None: planned from the shapes.
            attention: implementation of prefix attention (see `bicache_jax.kernels.prefix_attention`).
            mesh: mesh `("data", "model")` to run on (`bicache_jax.sharding.make_mesh`); None: the default device. A
                model that was not loaded onto it is cut here.

        Raises:
            BicacheError: there is no boundary table for the model, the boundary is deeper than the model, the
                implementation of attention does not run here, or the mesh has other axes.
        """
        if batch_size is not None and batch_size < 1:
            raise BicacheError(f"batch_size must be >= 1, got {batch_size}")
        self.model = model
        self.cache = cache or CacheConfig()
        self.sampling = sampling or SamplingConfig()
        self.batch_size = batch_size
        self._placement = place = Placement(model.config, None if mesh is None else check_mesh(mesh))
        self._backbone = backbone_here(place.layout.local, attention, axis=place.axis)
        self._params = place.params(model.params, self._backbone.axes)
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
        place, config, found = self._placement, self.model.config, self._rows(requests)
        dtype, weights = jnp.dtype(self._params["embed"].dtype), params_bytes(self._params)
        room = room_of(place.devices)
        part = place.layout.local
        fitting = None if room is None else rows_fitting(found, part, weights, room, self.cache, dtype)
        rounds = plan_rounds(
            config, self.cache, found, shards=place.shards, batch_size=self.batch_size, rows_of=fitting
        )
        buffers = Buffers.of(rounds, config.num_layers)
        return Plan(config, dtype, self.cache, tuple(rounds), buffers, part, weights, room)

    def _answer(self, entries: Sequence[Request | Result], *, partial: bool) -> Iterator[tuple[int, int, Result]]:
        """Yields (place, sample, result)."""
        for place, entry in enumerate(entries):
            if isinstance(entry, Result):
                yield place, entry.sample, entry
        places = {id(entry): place for place, entry in enumerate(entries)}
        plan = self._plan([entry for entry in entries if isinstance(entry, Request)])
        store = PrefixStore(plan)
        for batches in plan.rounds:
            for row, result in self._run(batches, plan, store, partial):
                yield places[id(row.request)], row.sample, result

    def _run(self, batches: Round, plan: Plan, store: PrefixStore, partial: bool) -> Iterator[tuple[Row, Result]]:
        """Runs a batch on every data shard, to its end; between dispatches its state is tokens, counters and keys."""
        started = time.perf_counter()
        place, config, cache = self._placement, self.model.config, self.cache
        *_, num_rows, length = plan.shape(*batches)
        samplings = [batch.rows[0].request.sampling for batch in batches if batch.rows]
        guided = samplings[0].guided
        prefixes = self._prefixes(batches, plan, store)
        rows = place.rows(
            [
                lay_out(
                    [(row.request, row.sample, row.prefix_len) for row in batch.rows],
                    batch.prefix_index,
                    config,
                    num_rows=num_rows,
                    length=length,
                    guided=guided,
                )
                for batch in batches
            ]
        )
        decoding = place.decoding(
            [
                make_decoding(
                    config,
                    sampling := batch.rows[0].request.sampling if batch.rows else samplings[0],
                    batch.boundary,
                    cache.refresh_interval,
                    block_cache=cache.block_cache,
                    room=length_bucket(sampling.num_steps // sampling.num_blocks),
                )
                for batch in batches
            ]
        )
        intervals = 1 if partial else max(map(most_steps, samplings))
        state = place.state(rows, plan.dtype, block_cache=cache.block_cache != "off")
        for window, stop_block in stages(samplings[0], cache.block_cache):
            stop = max(sampling.num_blocks for sampling in samplings) if not window else stop_block
            while True:
                state = decode(
                    self._backbone,
                    self._params,
                    prefixes,
                    state,
                    decoding,
                    jnp.asarray(intervals, jnp.int32),
                    jnp.asarray(stop, jnp.int32),
                    block_width=width_bucket(samplings[0].block_size),
                    deep_layers=plan.buffers.deep,
                    window=min(window and width_bucket(window), length),
                    guided=guided,
                    mesh=place.mesh,
                )
                self._count(dispatches=1)
                if not partial:
                    break
                seen = self._see(state[0])
                self._count(seconds=time.perf_counter() - started)
                if all(bool((done | (block >= stop)).all()) for *_, done, block in seen.values()):
                    break
                yield from self._results(batches, seen, finished=False)
                started = time.perf_counter()
        seen = self._see(state[0])
        self._count(
            seconds=time.perf_counter() - started,
            batches=sum(bool(batch.rows) for batch in batches),
            rows=sum(len(batch.rows) for batch in batches),
            tokens=sum(row.request.sampling.gen_length for batch in batches for row in batch.rows),
            forward_passes=sum(int(seen[i][2][: len(batches[i].rows)].sum()) for i in seen),
            passes_saved=sum(
                passes_saved(batches[i].rows[0].request.sampling, seen[i][4][: len(batches[i].rows)])
                for i in seen
                if batches[i].rows
            ),
        )
        yield from self._results(batches, seen, finished=True)

    def _see(self, rows: Rows) -> dict[int, list[np.ndarray]]:
        """Waits for a dispatch and fetches what results are made of, by data shard."""
        return self._placement.read([rows.tokens, rows.step, rows.forward_passes, rows.done, rows.block])

    def _prefixes(self, batches: Round, plan: Plan, store: PrefixStore) -> PrefixCache:
        """The round's prefixes as one cache; each is encoded when it is first needed and kept for its last round."""
        groups, length, _, _ = plan.shape(*batches)
        place, last = self._placement, self.model.config.num_layers - 1
        for prefixes in store.missing(batches, length):
            pieces = place.split(self._encode(prefixes, plan, store, length))
            for shard, prefix in enumerate(prefixes):
                if prefix is not None:
                    store.put(shard, length, prefix, pieces[shard])
            self._count(prefixes_encoded=sum(map(bool, prefixes)), prefix_hits=-sum(map(bool, prefixes)))
        self._count(prefix_hits=sum(row.prefix_len > 0 for b in batches for row in b.rows for _ in range(1 + b.guided)))
        caches = tuple(map(place.assemble, store.columns(batches, length, groups)))
        store.release(batches, length)
        boundary = place.vector([min(batch.boundary, last) for batch in batches])
        return join_prefixes(caches, boundary, mesh=place.mesh)

    def _encode(
        self, prefixes: Sequence[tuple[int, ...] | None], plan: Plan, store: PrefixStore, length: int
    ) -> PrefixCache:
        """Encodes a prefix on every data shard, `length` tokens long, for the boundaries that its rows use."""
        ids = np.zeros((len(prefixes), 1, length), np.int32)
        slots = np.full((len(prefixes), plan.buffers.slots), self.model.config.num_layers, np.int32)
        for shard, prefix in enumerate(prefixes):
            if prefix:
                ids[shard, 0, : len(prefix)] = prefix
                boundaries = store.boundaries(prefix)
                slots[shard, : len(boundaries)] = boundaries
        place = self._placement
        return encode(
            self._backbone,
            self._params,
            place.tokens(list(ids)),
            place.vector([len(prefix or ()) for prefix in prefixes]),
            place.tokens(list(slots)),
            num_layers=plan.buffers.shallow,
            mesh=place.mesh,
        )

    def _results(
        self, batches: Round, seen: Mapping[int, Sequence[np.ndarray]], *, finished: bool
    ) -> Iterator[tuple[Row, Result]]:
        """Results of the rows that this process can see."""
        config, tokenizer = self.model.config, self.model.tokenizer
        front = int(config.shift_logits)
        for shard, place, row in [(s, p, row) for s in seen for p, row in enumerate(batches[s].rows)]:
            state, boundary = seen[shard], batches[shard].boundary
            tokens = tuple(int(token) for token in state[0][place, front : front + row.request.sampling.gen_length])
            ends = [at for at, token in enumerate(tokens) if token in config.eos_ids]
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
                    boundary=boundary,
                    refresh_interval=self.cache.refresh_interval,
                    steps=int(state[1][place]),
                    forward_passes=int(state[2][place]),
                    masked=() if finished else tuple(i for i, token in enumerate(tokens) if token == config.mask_id),
                ),
            )

    def _count(self, **more: float) -> None:
        now = {name: getattr(self._stats, name) + value for name, value in more.items()}
        self._stats = dataclasses.replace(self._stats, **now)
