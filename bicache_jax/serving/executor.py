"""What runs programs on the devices and makes results of what they leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bicache_jax.core.backbone import Backbone
from bicache_jax.core.buckets import prefix_bucket, suffix_bucket, width_bucket
from bicache_jax.core.cache import PrefixCache, Rows
from bicache_jax.core.config import CacheConfig
from bicache_jax.core.layout import hole_of_place, lay_out, response_slots, suffix_length
from bicache_jax.core.types import Model, Result
from bicache_jax.decoding.drift import drift
from bicache_jax.decoding.encode import encode
from bicache_jax.decoding.likelihood import Scored, score
from bicache_jax.serving.grouping import Row
from bicache_jax.serving.placement import Placement
from bicache_jax.serving.programs import EncodeCall
from bicache_jax.serving.stats import Counters
from bicache_jax.serving.texts import read_text


def not_finite(request_id: str, when: str = "") -> str:
    """What is said where logits are not finite."""
    return (
        f"request {request_id!r}: the model's logits are not finite{when}: its weights hold NaN or infinity, or"
        " overflow in this dtype; load it with --check-weights (check_weights=True) to see which"
    )


@dataclasses.dataclass(frozen=True)
class Executor:
    """A model on its devices.

    Attributes:
        model: the model, for its configuration and tokenizer.
        cache: how prefixes are reused.
        placement: where the arrays lie.
        backbone: a device's part of the model.
        params: the parameters as they lie on the devices.
        counters: what has been done.
        shapes: the programs that have run, by what their rows have in common and their shape.
    """

    model: Model
    cache: CacheConfig
    placement: Placement
    backbone: Backbone
    params: Any
    counters: Counters
    shapes: set[tuple[object, ...]] = dataclasses.field(default_factory=set)

    def encode(self, call: EncodeCall) -> PrefixCache:
        """Encodes a prefix on every data shard."""
        placement = self.placement
        ids, lengths, slots = zip(*map(call.shard, range(len(call.prefixes))), strict=True)
        return encode(
            self.backbone,
            self.params,
            placement.put(ids),
            placement.put(lengths),
            placement.put(slots),
            jnp.asarray(call.block_length, jnp.int32),
            None if call.before is None else placement.assemble([call.before]),
            mesh=placement.mesh,
            **call.sizes,
        )

    def score(
        self,
        cache: PrefixCache,
        rows: Sequence[Mapping[str, np.ndarray]],
        targets: Sequence[np.ndarray],
        masked: Sequence[np.ndarray],
        boundaries: Sequence[int],
        looks: Sequence[int],
        block_length: int,
        *,
        deep_layers: int,
    ) -> Scored:
        """Looks at rows under their masks (`bicache_jax.decoding.likelihood.score`); what is given is each shard's."""
        placement = self.placement
        return score(
            self.backbone,
            self.params,
            cache,
            placement.rows(rows),
            placement.put(targets),
            placement.put(masked),
            placement.put([np.asarray([boundary], np.int32) for boundary in boundaries]),
            placement.put([np.asarray([count], np.int32) for count in looks]),
            jnp.asarray(block_length, jnp.int32),
            deep_layers=deep_layers,
            mesh=placement.mesh,
        )

    def drift(self, row: Row) -> tuple[float, float]:
        """How far a row's prefix cache moves the predictions of its first pass, guidance aside.

        Returns:
            Mean and largest divergence of a response token's prediction, in nats.
        """
        placement, config, request = self.placement, self.model.config, row.request
        length = prefix_bucket(row.prefix_len, growing=False)
        ids = np.zeros((1, length), np.int32)
        ids[0, : row.prefix_len] = request.prompt_ids[: row.prefix_len]
        block = request.sampling.block_size

        def rows(prefix_len: int) -> Rows:
            size = suffix_bucket(suffix_length(request, prefix_len) + config.block_causal * block, growing=False)
            laid = lay_out([(request, row.sample, prefix_len)], [0], config, num_rows=1, length=size)
            return placement.rows([laid] * placement.shards)

        found = drift(
            self.backbone,
            self.params,
            placement.put([ids] * placement.shards),
            placement.put([np.asarray([row.prefix_len], np.int32)] * placement.shards),
            rows(row.prefix_len),
            rows(0),
            jnp.asarray(row.boundary, jnp.int32),
            jnp.asarray(block, jnp.int32),
            width=width_bucket(request.sampling.gen_length),
            cache_dtype=self.cache.cache_dtype,
            mesh=placement.mesh,
        )
        nats = next(iter(placement.read([found]).values()))[0][0, : request.sampling.gen_length]
        return float(nats.mean()), float(nats.max())

    def result(self, row: Row, counts: Mapping[str, int], tokens: np.ndarray, cached: int) -> Result | None:
        """What there is to say of a row, from how it stands (`bicache_jax.serving.lane.Seen`); None: nothing yet."""
        if counts["failed"]:
            return self._failure(row, counts["step"]) if counts["done"] else None
        config, tokenizer, finished = self.model.config, self.model.tokenizer, bool(counts["done"])
        ids = tuple(map(int, tokens[response_slots(row.request, row.prefix_len, config)]))
        decoded = hole_of_place(row.request)[row.request.lead :] >= 0
        read = read_text(ids, row.request, config, tokenizer)
        return Result(
            id=row.request.id,
            sample=row.sample,
            token_ids=ids,
            text=read.text,
            finish_reason=("stop" if read.ended else "length") if finished else None,
            prefix_len=row.prefix_len,
            prefix_ratio=row.ratio,
            boundary=row.boundary,
            refresh_interval=self.cache.interval(row.request.sampling),
            steps=counts["step"],
            forward_passes=counts["forward_passes"],
            masked=() if finished else tuple(i for i, t in enumerate(ids) if t == config.mask_id and decoded[i]),
            prompt_len=len(row.request.prompt_ids),
            text_len=read.length,
            chat=row.request.chat,
            holes=read.holes,
            cached_tokens=cached,
        )

    def _failure(self, row: Row, step: int) -> Result:
        """What becomes of a row whose logits are not finite: no token of it would mean anything."""
        return Result(
            id=row.request.id,
            sample=row.sample,
            finish_reason="error",
            error=not_finite(row.request.id, f" at step {step}"),
            steps=step,
            chat=row.request.chat,
            engine_fault=True,
        )
