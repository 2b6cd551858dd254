"""Runs planned rounds on the devices: prefixes encoded, batches denoised, canvases read back as results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bicache_jax.core.backbone import Backbone
from bicache_jax.core.boundary import clamp_boundary
from bicache_jax.core.cache import PrefixCache, Rows
from bicache_jax.core.config import CacheConfig
from bicache_jax.core.layout import response_slots
from bicache_jax.core.types import Model, Result
from bicache_jax.decoding.encode import encode
from bicache_jax.decoding.interval import NO_LIMIT, decode
from bicache_jax.decoding.join import join_prefixes
from bicache_jax.decoding.schedule import passes_saved
from bicache_jax.serving.frames import Frames
from bicache_jax.serving.grouping import Row
from bicache_jax.serving.placement import Placement
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.programs import DecodeCall, EncodeCall
from bicache_jax.serving.rounds import Round
from bicache_jax.serving.stats import Counters
from bicache_jax.serving.store import RunPrefixes
from bicache_jax.serving.texts import read_text


@dataclasses.dataclass(frozen=True)
class Executor:
    """Runs rounds of a plan.

    Attributes:
        model: the model, for its configuration and tokenizer.
        cache: how prefixes are reused.
        placement: where the arrays lie.
        backbone: a device's part of the model.
        params: the parameters as they lie on the devices.
        counters: what has been done.
    """

    model: Model
    cache: CacheConfig
    placement: Placement
    backbone: Backbone
    params: Any
    counters: Counters

    def run(
        self,
        batches: Round,
        plan: Plan,
        prefixes: RunPrefixes,
        frames: Frames | None = None,
        *,
        compile_only: bool = False,
    ) -> Iterator[tuple[Row, Result]]:
        """Runs a batch on every data shard, to its end.

        Args:
            batches: the round.
            plan: the run that it is of.
            prefixes: the run's prefixes, encoded or not yet.
            frames: how often to look at the canvases; None: at the end.
            compile_only: call every program, and make no step: the results are empty canvases.

        Yields:
            Each row's result, after unfinished ones where there are frames.
        """
        started = time.perf_counter()
        call, placement = DecodeCall(plan, batches), self.placement
        cache = self._prefixes(batches, plan, prefixes)
        rows = placement.rows([call.rows(batch) for batch in batches])
        decoding = placement.decoding([call.decoding(batch) for batch in batches])
        state = placement.state(rows, **call.state_sizes)
        for stage in call.stages:
            while True:
                state = decode(
                    self.backbone,
                    self.params,
                    cache,
                    state,
                    decoding,
                    jnp.asarray(0 if compile_only else frames.steps if frames else NO_LIMIT, jnp.int32),
                    jnp.asarray(stage.stop_block, jnp.int32),
                    mesh=placement.mesh,
                    **call.sizes(stage),
                )
                self.counters.add(dispatches=1)
                if frames is None:
                    break
                seen = self._see(state.rows)
                self.counters.add(seconds=time.perf_counter() - started)
                if all((shard["done"] | (shard["block"] >= stage.stop_block)).all() for shard in seen.values()):
                    break
                yield from self._results(batches, seen, finished=False)
                frames.shown()
                started = time.perf_counter()
        seen = self._see(state.rows)
        used = [(batches[i], {name: values[: len(batches[i].rows)] for name, values in seen[i].items()}) for i in seen]
        self.counters.add(
            seconds=time.perf_counter() - started,
            batches=sum(bool(batch.rows) for batch in batches),
            rows=sum(len(batch.rows) for batch in batches),
            tokens=sum(row.request.sampling.gen_length for batch in batches for row in batch.rows),
            forward_passes=sum(int(shard["forward_passes"].sum()) for _, shard in used),
            passes_saved=sum(
                passes_saved(batch.rows[0].request.sampling, shard["block"]) for batch, shard in used if batch.rows
            ),
        )
        yield from self._results(batches, seen, finished=True)

    def _see(self, rows: Rows) -> dict[int, dict[str, np.ndarray]]:
        """Waits for a dispatch and fetches what results are made of, by data shard."""
        names = ("tokens", "step", "forward_passes", "done", "block", "failed")
        found = self.placement.read([getattr(rows, name) for name in names])
        return {shard: dict(zip(names, values, strict=True)) for shard, values in found.items()}

    def _prefixes(self, batches: Round, plan: Plan, known: RunPrefixes) -> PrefixCache:
        """The round's prefixes as one cache; each is encoded when it is first needed and kept for its last round."""
        groups, length, _, _ = plan.shape(*batches)
        placement, num_layers = self.placement, self.model.config.num_layers
        for prefixes in known.missing(batches, length):
            used = [known.boundaries(shard, length, prefix) if prefix else [] for shard, prefix in enumerate(prefixes)]
            pieces = placement.split(self._encode(prefixes, plan, used, length))
            for shard, prefix in enumerate(prefixes):
                if prefix is not None:
                    known.put(shard, length, prefix, pieces[shard], used[shard])
            self.counters.add(prefixes_encoded=sum(map(bool, prefixes)), prefix_hits=-sum(map(bool, prefixes)))
        cached = [batch for batch in batches for row in batch.rows if row.prefix_len]
        self.counters.add(prefix_hits=sum(1 + batch.guided for batch in cached))
        caches = tuple(map(placement.assemble, known.columns(batches, length, groups)))
        known.release(batches, length)
        boundary = [np.asarray([clamp_boundary(batch.boundary, num_layers)], np.int32) for batch in batches]
        return join_prefixes(caches, placement.put(boundary), mesh=placement.mesh)

    def _encode(
        self, prefixes: Sequence[tuple[int, ...] | None], plan: Plan, used: Sequence[Sequence[int]], length: int
    ) -> PrefixCache:
        """Encodes a prefix on every data shard, padded to `length` tokens, for the boundaries that it is used at."""
        call, placement = EncodeCall(plan, prefixes, used, length), self.placement
        ids, lengths, slots = zip(*map(call.shard, range(len(prefixes))), strict=True)
        return encode(
            self.backbone,
            self.params,
            placement.put(ids),
            placement.put(lengths),
            placement.put(slots),
            mesh=placement.mesh,
            **call.sizes,
        )

    def _results(
        self, batches: Round, seen: Mapping[int, Mapping[str, np.ndarray]], *, finished: bool
    ) -> Iterator[tuple[Row, Result]]:
        """Results of the rows that this process can see."""
        for shard, values in seen.items():
            for number, row in enumerate(batches[shard].rows):
                of_row = {name: array[number] for name, array in values.items()}
                if not of_row["failed"]:
                    yield row, self._result(row, batches[shard].boundary, of_row, finished=finished)
                elif finished:
                    yield row, self._failure(row, int(of_row["step"]))

    def _result(self, row: Row, boundary: int, values: Mapping[str, np.ndarray], *, finished: bool) -> Result:
        config, tokenizer = self.model.config, self.model.tokenizer
        tokens = tuple(map(int, values["tokens"][response_slots(config, row.request.sampling.gen_length)]))
        read = read_text(tokens, row.request, config, tokenizer)
        return Result(
            id=row.request.id,
            sample=row.sample,
            token_ids=tokens,
            text=read.text,
            finish_reason=("stop" if read.ended else "length") if finished else None,
            prefix_len=row.prefix_len,
            prefix_ratio=row.ratio,
            boundary=boundary,
            refresh_interval=self.cache.interval(row.request.sampling),
            steps=int(values["step"]),
            forward_passes=int(values["forward_passes"]),
            masked=() if finished else tuple(i for i, token in enumerate(tokens) if token == config.mask_id),
            prompt_len=len(row.request.prompt_ids),
            text_len=read.length,
            chat=row.request.chat,
        )

    def _failure(self, row: Row, step: int) -> Result:
        """What becomes of a row whose logits are not finite: no token of it would mean anything."""
        return Result(
            id=row.request.id,
            sample=row.sample,
            finish_reason="error",
            error=f"request {row.request.id!r}: the model's logits are not finite at step {step}: its weights hold NaN"
            " or infinity, or overflow in this dtype; load it with --check-weights (check_weights=True) to see which",
            steps=step,
            chat=row.request.chat,
            engine_fault=True,
        )
