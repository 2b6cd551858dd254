"""The cases of a benchmark: a grid of settings, with lengths that go together where they are left open."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from bicache_jax.core.config import REFRESH_INTERVAL, CacheConfig, SamplingConfig
from bicache_jax.core.types import BicacheError
from bicache_jax.measure.benchmark import Case
from bicache_jax.measure.policies import comparable, parse_policy

Intervals = Sequence[int | Literal["auto"]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Settings of which every combination is measured.

    Attributes:
        policies: names, as `parse_policy` takes them.
        baselines: names of programs of others that run the same requests.
        prefixes: tokens of the shared prefix; percent of the whole sequence with `by_ratio`.
        by_ratio: whether they are.
        suffixes: tokens of the rest of the prompt and the response.
        rows: rows of the batch.
        groups: prefixes that the rows share.
        refresh_intervals: N.
        boundaries: b, or `auto`.
        gen_length: response tokens; None: half of the suffix, in whole blocks.
        steps: denoising steps; None: the longest of the refresh intervals, at most a token a step.
        block_length: tokens of a block; None: what the policies imply.
    """

    policies: Sequence[str]
    baselines: Sequence[str]
    prefixes: Sequence[int]
    by_ratio: bool
    suffixes: Sequence[int]
    rows: Sequence[int]
    groups: Sequence[int]
    refresh_intervals: Intervals
    boundaries: Intervals
    gen_length: int | None
    steps: int | None
    block_length: int | None

    def cases(self) -> list[Case]:
        """The cases, policies innermost; those that a policy cannot tell apart are one.

        Raises:
            BicacheError: there is no such policy, or more prefixes than rows.
            ValueError: lengths and steps do not go together.
        """
        found: dict[Case, None] = {}
        for suffix, length, rows, groups in itertools.product(self.suffixes, self.prefixes, self.rows, self.groups):
            if groups > rows:
                raise BicacheError(f"prefixes {groups}: needs at least as many rows, got {rows}")
            prefix = round(length * suffix / (100 - length)) if self.by_ratio else length
            sampling = self.sampling(suffix)
            for interval, boundary, policy in itertools.product(
                self.refresh_intervals, self.boundaries, (*self.policies, *self.baselines)
            ):
                # A setting that a policy ignores adds no case.
                cache = CacheConfig(refresh_interval=self.refresh_intervals[0])
                cache = cache if policy in self.baselines else parse_policy(policy, cache)
                if policy not in self.baselines and cache.policy != "none":
                    cache = dataclasses.replace(cache, refresh_interval=interval)
                case = Case(
                    policy=policy,
                    prefix=prefix,
                    suffix=suffix,
                    rows=rows,
                    prefixes=groups,
                    refresh_interval=cache.interval(sampling),
                    boundary=boundary if policy.startswith("bicache") else "auto",
                    sampling=sampling,
                )
                found[case] = None
        return list(found)

    def sampling(self, suffix: int) -> SamplingConfig:
        """Decoding settings of a suffix of this length.

        Raises:
            ValueError: lengths and steps do not go together.
        """
        cache = comparable(parse_policy(name, CacheConfig()) for name in self.policies)
        gen_length = self.gen_length or max(1, suffix // 2)
        block = self.block_length or cache.default_block(gen_length)
        if self.gen_length is None:
            gen_length -= gen_length % block if gen_length > block else 0
        blocks = max(1, gen_length // block)
        longest = max(REFRESH_INTERVAL if interval == "auto" else interval for interval in self.refresh_intervals)
        steps = self.steps or min(gen_length, -(-longest // blocks) * blocks)
        sampling = SamplingConfig(gen_length=gen_length, steps=steps, block_length=block)
        sampling.check_even()
        return sampling
