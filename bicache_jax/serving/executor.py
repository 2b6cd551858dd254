"""Runs planned rounds on the devices: prefixes encoded, batches denoised, canvases read back as results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bicache_jax.core.backbone import Backbone
from bicache_jax.core.buckets import length_bucket, width_bucket
from bicache_jax.core.cache import PrefixCache, Rows
from bicache_jax.core.config import CacheConfig
from bicache_jax.core.layout import lay_out
from bicache_jax.core.types import Model, Result
from bicache_jax.decoding.encode import encode
from bicache_jax.decoding.interval import decode
from bicache_jax.decoding.join import join_prefixes
from bicache_jax.decoding.schedule import make_decoding, most_steps, passes_saved, stages
from bicache_jax.serving.grouping import Row
from bicache_jax.serving.placement import Placement
from bicache_jax.serving.plan import Plan
from bicache_jax.serving.rounds import Round
from bicache_jax.serving.stats import Counters
from bicache_jax.serving.store import PrefixStore
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
        self, batches: Round, plan: Plan, store: PrefixStore, *, partial: bool, compile_only: bool = False
    ) -> Iterator[tuple[Row, Result]]:
        """Runs a batch on every data shard, to its end; between dispatches its state is tokens, counters and keys.

        With `compile_only` every program is called, and none makes a step: the results are empty canvases.
        """
        started = time.perf_counter()
        placement, config, cache = self.placement, self.model.config, self.cache
        *_, num_rows, length = plan.shape(*batches)
        samplings = [batch.rows[0].request.sampling for batch in batches if batch.rows]
        guided = samplings[0].guided
        prefixes = self._prefixes(batches, plan, store)
        rows = placement.rows(
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
        decoding = placement.decoding(
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
        intervals = 0 if compile_only else 1 if partial else max(map(most_steps, samplings))
        state = placement.state(rows, plan.dtype, block_cache=cache.block_cache != "off")
        for window, stop_block in stages(samplings[0], cache.block_cache):
            stop = max(sampling.num_blocks for sampling in samplings) if not window else stop_block
            while True:
                state = decode(
                    self.backbone,
                    self.params,
                    prefixes,
                    state,
                    decoding,
                    jnp.asarray(intervals, jnp.int32),
                    jnp.asarray(stop, jnp.int32),
                    block_width=width_bucket(samplings[0].block_size),
                    deep_layers=plan.buffers.deep,
                    window=min(window and width_bucket(window), length),
                    guided=guided,
                    mesh=placement.mesh,
                )
                self.counters.add(dispatches=1)
                if not partial:
                    break
                seen = self._see(state[0])
                self.counters.add(seconds=time.perf_counter() - started)
                if all(bool((done | (block >= stop)).all()) for *_, done, block in seen.values()):
                    break
                yield from self._results(batches, seen, finished=False)
                started = time.perf_counter()
        seen = self._see(state[0])
        self.counters.add(
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
        return self.placement.read([rows.tokens, rows.step, rows.forward_passes, rows.done, rows.block])

    def _prefixes(self, batches: Round, plan: Plan, store: PrefixStore) -> PrefixCache:
        """The round's prefixes as one cache; each is encoded when it is first needed and kept for its last round."""
        groups, length, _, _ = plan.shape(*batches)
        placement, last = self.placement, self.model.config.num_layers - 1
        for prefixes in store.missing(batches, length):
            pieces = placement.split(self._encode(prefixes, plan, store, length))
            for shard, prefix in enumerate(prefixes):
                if prefix is not None:
                    store.put(shard, length, prefix, pieces[shard])
            self.counters.add(prefixes_encoded=sum(map(bool, prefixes)), prefix_hits=-sum(map(bool, prefixes)))
        cached = [batch for batch in batches for row in batch.rows if row.prefix_len]
        self.counters.add(prefix_hits=sum(1 + batch.guided for batch in cached))
        caches = tuple(map(placement.assemble, store.columns(batches, length, groups)))
        store.release(batches, length)
        boundary = placement.vector([min(batch.boundary, last) for batch in batches])
        return join_prefixes(caches, boundary, mesh=placement.mesh)

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
        placement = self.placement
        return encode(
            self.backbone,
            self.params,
            placement.tokens(list(ids)),
            placement.vector([len(prefix or ()) for prefix in prefixes]),
            placement.tokens(list(slots)),
            num_layers=plan.buffers.shallow,
            mesh=placement.mesh,
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
            read = read_text(tokens, row.request, config, tokenizer)
            yield (
                row,
                Result(
                    id=row.request.id,
                    sample=row.sample,
                    token_ids=tokens,
                    text=read.text,
                    finish_reason=("stop" if read.ended else "length") if finished else None,
                    prefix_len=row.prefix_len,
                    prefix_ratio=row.ratio,
                    boundary=boundary,
                    refresh_interval=self.cache.refresh_interval,
                    steps=int(state[1][place]),
                    forward_passes=int(state[2][place]),
                    masked=() if finished else tuple(i for i, token in enumerate(tokens) if token == config.mask_id),
                    prompt_len=len(row.request.prompt_ids),
                    text_len=read.length,
                    chat=row.request.chat,
                ),
            )
