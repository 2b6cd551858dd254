"""The engine: requests in, results out, each prefix encoded once.

    requests -> prefixes -> boundaries -> batches -> encode prefix -> intervals -> results

What runs on the device are two programs, `encode` and `decode`; everything here is bookkeeping between them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from bicache_jax.core.boundary import boundary_at
from bicache_jax.core.config import CACHED_BLOCK, CacheConfig, SamplingConfig
from bicache_jax.core.types import BicacheError, Model, Request, Result
from bicache_jax.serving.executor import Executor
from bicache_jax.serving.frames import SECONDS, Frames
from bicache_jax.serving.grouping import Row, detect_prefixes, prefix_ratio
from bicache_jax.serving.memory import Buffers, params_bytes
from bicache_jax.serving.placement import Placement
from bicache_jax.serving.plan import Plan, rows_fitting
from bicache_jax.serving.requests import parse_requests
from bicache_jax.serving.rounds import plan_rounds
from bicache_jax.serving.stats import Counters, Stats
from bicache_jax.serving.store import PrefixStore
from bicache_jax.sharding import check_mesh
from bicache_jax.wiring import backbone_here, device_memory


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
        placement = Placement(model.config, None if mesh is None else check_mesh(mesh))
        backbone = backbone_here(placement.partition.local, attention, axis=placement.axis)
        params = placement.params(model.params, backbone.axes)
        self._counters = Counters()
        self._executor = Executor(model, self.cache, placement, backbone, params, self._counters)
        self._boundary_of = self._boundary_rule()

    @property
    def stats(self) -> Stats:
        """What has been done so far."""
        return self._counters.stats

    def generate(self, requests: Iterable[Request | Result | Mapping[str, Any]]) -> list[Result]:
        """Answers requests.

        Args:
            requests: parsed requests, or objects as in a request file; an error `Result` passes through.

        Returns:
            Results in the order of the requests, samples of a request in order.
        """
        answers = sorted(self._answer(self._admit(requests)), key=lambda answer: answer[:2])
        return [result for _, _, result in answers]

    def stream(
        self,
        requests: Iterable[Request | Result | Mapping[str, Any]],
        *,
        partial: bool = True,
        every: int | None = None,
        frame_seconds: float = SECONDS,
    ) -> Iterator[Result]:
        """Answers requests as they finish.

        Args:
            requests: as in `generate`.
            partial: show every row while it is denoised too, its canvas as it is (mask tokens where it is undecided)
                and `finish_reason` None. How often never changes a token.
            every: denoising steps between two such looks; None: as many as take about `frame_seconds`.
            frame_seconds: seconds between them.

        Yields:
            Results, errors first, then in the order of completion.
        """
        frames = Frames(every, seconds=frame_seconds) if partial else None
        for _, _, result in self._answer(self._admit(requests), frames):
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
                requests, min_prefix=self.cache.min_prefix, min_suffix=self.model.config.shifted
            )
        rows = []
        for request, prefix_len in zip(requests, lengths, strict=True):
            ratio = prefix_ratio(prefix_len, len(request.prompt_ids) + request.sampling.gen_length)
            boundary = self._boundary_of(ratio) if prefix_len else 0
            rows += [Row(request, sample, prefix_len, ratio, boundary) for sample in range(request.n)]
        return rows

    def _plan(self, requests: Sequence[Request]) -> Plan:
        placement, params = self._executor.placement, self._executor.params
        config, found = self.model.config, self._rows(requests)
        dtype, weights = jnp.dtype(params["embed"].dtype), params_bytes(params)
        partition, device = placement.partition, device_memory(placement.devices)
        fitting = None if device is None else rows_fitting(found, partition, weights, device, self.cache, dtype)
        rounds = plan_rounds(
            config, self.cache, found, shards=placement.shards, batch_size=self.batch_size, rows_of=fitting
        )
        buffers = Buffers.of(rounds, config.num_layers)
        return Plan(config, dtype, self.cache, tuple(rounds), buffers, partition.local, weights, device)

    def _answer(
        self, entries: Sequence[Request | Result], frames: Frames | None = None
    ) -> Iterator[tuple[int, int, Result]]:
        """Yields (place, sample, result)."""
        for place, entry in enumerate(entries):
            if isinstance(entry, Result):
                yield place, entry.sample, entry
        places = {id(entry): place for place, entry in enumerate(entries)}
        plan = self._plan([entry for entry in entries if isinstance(entry, Request)])
        store = PrefixStore(plan)
        for batches in plan.rounds:
            for row, result in self._executor.run(batches, plan, store, frames):
                yield places[id(row.request)], row.sample, result
