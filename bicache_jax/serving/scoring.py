"""Scoring: likelihoods of texts behind prompts, over the same prefixes, boundaries, buckets and memory as decoding.

    requests -> prefixes -> texts (or their blocks) -> distinct masks -> rows -> batches -> looks -> estimates

A row is some looks at one text: at most as many as a refresh interval has steps, since they share a refresh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from itertools import islice

import numpy as np

from bicache_jax.core.buckets import count_bucket
from bicache_jax.core.config import ModelConfig, SamplingConfig
from bicache_jax.core.layout import given_tokens, noise_words, response_slots
from bicache_jax.core.masks import Masks
from bicache_jax.core.score import Estimate, Likelihood, Score
from bicache_jax.core.types import Request
from bicache_jax.serving.executor import Executor, not_finite
from bicache_jax.serving.grouping import detect_prefixes, prefix_ratio
from bicache_jax.serving.looking import Looking, LookRow, Part, Pending
from bicache_jax.serving.planner import Planner
from bicache_jax.serving.run_prefixes import RunPrefixes
from bicache_jax.serving.scheduler import scheduled
from bicache_jax.serving.score_requests import ScoreRequest
from bicache_jax.serving.store import PrefixStore

WINDOW = 512
"""Requests that are planned at a time: rows and masks of all of them are on the host at once."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores requests on an engine's devices.

    Attributes:
        executor: the model on its devices.
        planner: how prefixes are reused.
        store: where encodings are found, and kept.
        added: prefixes that were added by hand.
        namespace: theirs.
        estimate: how likelihoods are estimated.
    """

    executor: Executor
    planner: Planner
    store: PrefixStore
    added: Collection[tuple[int, ...]]
    namespace: str
    estimate: Estimate

    @property
    def _config(self) -> ModelConfig:
        return self.executor.model.config

    def _without_block_cache(self) -> Planner:
        """The planner of passes over whole suffixes."""
        return dataclasses.replace(self.planner, cache=dataclasses.replace(self.planner.cache, block_cache="off"))

    def settle(self, requests: Sequence[ScoreRequest]) -> list[int]:
        """The prefix of each request among all of a call, in tokens.

        It is the request's own (`prefix_len`, all messages but the last of the user), the longest one that was added,
        or what its prompt shares with the call's other requests, as `CacheConfig.prefix_detection` says. Where that is
        nothing, it is the whole prompt: the texts of a request and their samples share it.
        """
        cache, min_suffix = self.planner.cache, self._config.shifted
        if cache.policy == "none":
            return [0] * len(requests)
        found = detect_prefixes(
            [
                Request(r.id, r.prompt_ids, r.prefix_len, index=i, prefix_from_messages=r.prefix_from_messages)
                for i, r in enumerate(requests)
            ],
            min_prefix=cache.min_prefix,
            min_suffix=min_suffix,
            detection=cache.prefix_detection,
            added=self.added,
        )
        for place, request in enumerate(requests):
            several = len(request.texts) > 1 or self.estimate.method != "pseudo"
            if not found[place] and request.prefix_len is None and several and cache.prefix_detection != "off":
                found[place] = max(0, len(request.prompt_ids) - min_suffix)
        return found

    def run(self, requests: Sequence[ScoreRequest], prefix_lens: Sequence[int] | None = None) -> Iterator[Score]:
        """Scores requests, those with a common prefix one after the other.

        Args:
            requests: the requests.
            prefix_lens: their prefixes, from `settle`; None: those that they have among each other.

        Yields:
            A score for each, as they are done.
        """
        prefix_lens = self.settle(requests) if prefix_lens is None else prefix_lens
        order = sorted(
            zip(requests, prefix_lens, strict=True), key=lambda each: (each[0].prompt_ids[: each[1]], each[0].index)
        )
        todo = iter(order)
        while window := list(islice(todo, WINDOW)):
            pending = [self._pending(request, prefix_len) for request, prefix_len in window]
            greedy = self._greedy([one for one in pending if one.request.greedy])
            for done in self._looks(pending):
                self.executor.counters.add(scored=len(done.texts))
                yield self._score(done, greedy)

    def answers(self, entries: Sequence[ScoreRequest | Score], *, progress: bool = False) -> list[Score]:
        """Scores of requests in order; what is a score already stays. `progress` shows a bar."""
        from tqdm.auto import tqdm

        found = {place: entry for place, entry in enumerate(entries) if isinstance(entry, Score)}
        requests = [
            dataclasses.replace(entry, index=place)
            for place, entry in enumerate(entries)
            if isinstance(entry, ScoreRequest)
        ]
        places = {request.id: request.index for request in requests}
        with tqdm(total=len(requests), unit="request", disable=not progress) as bar:
            for score in self.run(requests):
                found[places[score.id]] = score
                bar.update()
        return [found[place] for place in range(len(entries))]

    def _pending(self, request: ScoreRequest, prefix_len: int) -> Pending:
        """A request with the parts of its texts, and the masks of these."""
        config = self._config
        longest = max(map(len, request.texts))
        ratio = prefix_ratio(prefix_len, len(request.prompt_ids) + longest)
        pending = Pending(request, prefix_len, ratio)
        drawn: dict[tuple[int, int], Masks] = {}
        words = noise_words(request.id, request.seed)
        for number, text in enumerate(request.texts):
            parts, before, rest = list[Part](), request.prompt_ids, text
            while rest:
                block, size = None, len(rest)
                if config.block_causal:  # a block sees itself and what is before it, so each is a text of its own
                    block = config.block_length
                    size = min(size, block - int(given_tokens(len(before), block, config)))
                key = len(parts), size
                if key not in drawn:
                    drawn[key] = self.estimate.masks((*words, key[0]), size)
                sampling = SamplingConfig(size, 1, block, seed=request.seed)
                name = f"{request.id}/{number}/{len(parts)}"
                parts.append(
                    Part(Request(name, before, index=request.index, sampling=sampling), rest[:size], drawn[key])
                )
                before, rest = before + rest[:size], rest[size:]
            pending.texts.append(parts)
        return pending

    def _rows(self, pending: Pending, planner: Planner) -> Iterator[LookRow]:
        """The rows of a request."""
        exact = planner.cache.policy == "exact"
        for parts in pending.texts:
            for number, part in enumerate(parts):
                # Where nothing later changes what is before a block, all of that is its prefix.
                prefix_len = len(part.request.prompt_ids) if exact and number else pending.prefix_len
                row = planner.row(part.request, prefix_len, self.namespace)
                if row.prefix_len or exact:
                    row = dataclasses.replace(row, ratio=pending.ratio, boundary=planner.boundary_of(pending.ratio))
                pending.row = pending.row or row
                masks = len(part.masks.distinct)
                turns = math.ceil(masks / planner.cache.interval(part.request.sampling))
                looks = math.ceil(masks / turns)
                sampling = dataclasses.replace(part.request.sampling, steps=count_bucket(looks))  # passes, for the plan
                fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
                fields["request"] = dataclasses.replace(part.request, sampling=sampling)
                for turn, first in enumerate(range(0, masks, looks)):
                    pending.rows += 1
                    size = min(looks, masks - first)
                    yield LookRow(**fields | {"sample": turn}, part=part, pending=pending, first=first, looks=size)

    def _looks(self, pending: Sequence[Pending]) -> Iterator[Pending]:
        """Looks at all texts of some requests; yields the requests that are done."""
        planner = self._without_block_cache()
        plan = planner.plan([row for one in pending for row in self._rows(one, planner)], self.store)
        known = RunPrefixes(plan, self.store)
        try:
            yield from Looking(self.executor, plan, known).run()
        finally:
            known.close()

    def _greedy(self, pending: Sequence[Pending]) -> dict[tuple[str, int], bool]:
        """Whether greedy decoding, a token a step, gives each text of more than one token."""
        config = self._config
        planner = self.planner if self.planner.cache.policy == "exact" else self._without_block_cache()
        rows, texts = [], dict[str, tuple[str, int, tuple[int, ...]]]()
        for one in pending:
            for number, text in enumerate(one.request.texts):
                if len(text) == 1:
                    continue  # its one look says so
                sampling = planner.cache.with_blocks(SamplingConfig(len(text)), config)
                request = Request(f"{one.request.id}/{number}", one.request.prompt_ids, index=one.request.index)
                row = planner.row(dataclasses.replace(request, sampling=sampling), one.prefix_len, self.namespace)
                if row.prefix_len:
                    row = dataclasses.replace(row, ratio=one.ratio, boundary=planner.boundary_of(one.ratio))
                rows.append(row)
                texts[request.id] = one.request.id, number, text
        if not rows:
            return {}
        plan = planner.plan(rows, self.store)
        # A token a step, whatever the family's schedule makes of as many steps as there are tokens.
        plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, schedule="even"))
        known, found = RunPrefixes(plan, self.store), {}
        try:
            for seen in scheduled(self.executor, plan, known).run():
                if seen.done and seen.tokens is not None:
                    name, number, text = texts[seen.row.request.id]
                    made = seen.tokens[response_slots(seen.row.request, seen.row.prefix_len, config)]
                    found[name, number] = not seen.counts["failed"] and tuple(map(int, made)) == text
        finally:
            known.close()
        return found

    def _score(self, done: Pending, greedy: dict[tuple[str, int], bool]) -> Score:
        request, found = done.request, []
        assert done.row is not None
        for number, parts in enumerate(done.texts):
            estimates = sum(part.masks.estimates(part.log_p) for part in parts)
            assert isinstance(estimates, np.ndarray)
            if not np.isfinite(estimates).all():
                return Score(
                    request.id,
                    error=not_finite(request.id),
                    engine_fault=True,
                )
            size = len(estimates)
            error = 0.0 if self.estimate.method == "exact" else None
            found.append(
                Likelihood(
                    log_likelihood=float(estimates.mean()),
                    tokens=len(request.texts[number]),
                    bytes=request.sizes[number],
                    standard_error=error if size < 2 else float(estimates.std(ddof=1) / math.sqrt(size)),
                    passes=sum(len(part.log_p) for part in parts),
                    greedy=_is_greedy(parts, greedy.get((request.id, number))) if request.greedy else None,
                )
            )
        return Score(
            request.id,
            tuple(found),
            prompt_len=len(request.prompt_ids),
            prefix_len=done.row.prefix_len,
            prefix_ratio=prefix_ratio(done.row.prefix_len, len(request.prompt_ids) + max(map(len, request.texts))),
            boundary=done.row.boundary,
            cached_tokens=done.cached or 0,
        )


def _is_greedy(parts: Sequence[Part], decoded: bool | None) -> bool | None:
    return bool(parts[0].top[0]) if len(parts) == 1 and len(parts[0].tokens) == 1 else decoded
