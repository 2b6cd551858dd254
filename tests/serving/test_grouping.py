from __future__ import annotations

import hypothesis
import hypothesis.strategies as st

from bicache_jax.core.buckets import count_bucket, layer_bucket, length_bucket, width_bucket
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.core.types import Request
from bicache_jax.serving.grouping import DEEPER, Row, detect_prefixes, plan_batches, prefix_ratio


def _request(name: str, prompt: tuple[int, ...], **fields: object) -> Request:
    return Request(name, prompt, sampling=SamplingConfig(gen_length=8), **fields)  # type: ignore[arg-type]


_PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple), min_size=1, max_size=12)


@hypothesis.given(_PROMPTS, st.integers(1, 4), st.integers(0, 1), st.randoms(use_true_random=False))
def test_detected_prefixes_are_shared_long_enough_and_independent_of_order(
    prompts: list[tuple[int, ...]], least: int, rest: int, shuffler: object
) -> None:
    requests = [_request(str(i), prompt) for i, prompt in enumerate(prompts)]
    lengths = detect_prefixes(requests, min_prefix=least, min_suffix=rest)
    for place, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert length == 0 or least <= length <= len(prompt) - rest
        others = prompts[:place] + prompts[place + 1 :]
        assert length == 0 or any(other[:length] == prompt[:length] for other in others)
    order = list(range(len(prompts)))
    shuffler.shuffle(order)  # type: ignore[attr-defined]
    again = detect_prefixes([requests[place] for place in order], min_prefix=least, min_suffix=rest)
    assert again == [lengths[place] for place in order]


def _by_recursion(prompts: list[tuple[int, ...]], least: int, accepted: int = 0) -> dict[tuple[int, ...], int]:
    """The rule of `detect_prefixes` as it reads, for prompts that may be shared whole."""
    if len(prompts) == 1:
        return {prompts[0]: accepted}
    depth = next(
        (i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1), min(map(len, prompts))
    )
    accepted = depth if depth >= max(least, accepted * DEEPER) else accepted
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for place, prompt in enumerate(prompts):
        # A prompt that ends here has no token to go on with, and is alone, however many are like it.
        groups.setdefault(prompt[depth : depth + 1] or (-1, place), []).append(prompt)
    return {
        prompt: length for group in groups.values() for prompt, length in _by_recursion(group, least, accepted).items()
    }


@hypothesis.given(_PROMPTS, st.integers(1, 4))
def test_detected_prefixes_follow_the_rule(prompts: list[tuple[int, ...]], least: int) -> None:
    requests = [_request(str(i), prompt) for i, prompt in enumerate(prompts)]
    wanted = _by_recursion(prompts, least)
    assert detect_prefixes(requests, min_prefix=least, min_suffix=0) == [wanted[prompt] for prompt in prompts]


def test_detection_takes_linear_time() -> None:
    """Each prompt shares one token more with the next: every neighbour is a level of the tree."""
    requests = [_request(str(i), (*[7] * i, 1)) for i in range(3000)]
    lengths = detect_prefixes(requests, min_prefix=16, min_suffix=0)
    assert lengths[:16] == [0] * 16 and lengths[-1] > 2000


def test_two_questions_that_begin_alike_do_not_split_a_document() -> None:
    document = tuple(range(100))
    requests = [_request(str(i), (*document, 7, 8, i)) for i in range(3)] + [_request("x", (*document, 9))]
    assert detect_prefixes(requests, min_prefix=16, min_suffix=0) == [100] * 4


def test_a_document_below_a_common_instruction_gets_its_own_prefix() -> None:
    instruction, first, second = tuple(range(20)), tuple(range(20, 60)), tuple(range(60, 100))
    requests = [_request(str(i), (*instruction, *(first if i < 2 else second), 200 + i)) for i in range(4)]
    requests.append(_request("other", (*instruction, 300, 301)))
    assert 60 >= 20 * DEEPER
    assert detect_prefixes(requests, min_prefix=16, min_suffix=0) == [60, 60, 60, 60, 20]


def test_given_prefixes_and_samples() -> None:
    requests = [
        _request("a", (1, 2, 3), prefix_len=3),
        _request("b", (4, 5), n=2),
        _request("c", (4, 5, 6), prefix_len=0),
    ]
    assert detect_prefixes(requests, min_prefix=1, min_suffix=0) == [3, 2, 0]
    assert detect_prefixes(requests, min_prefix=1, min_suffix=1) == [2, 1, 0]


def test_ratio_is_rounded_as_python_rounds() -> None:
    assert [prefix_ratio(p, 200) for p in (1, 3, 5, 99)] == [0, 2, 2, 50]


_ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 80), st.integers(0, 3)), min_size=1, max_size=30
)


@hypothesis.given(_ROWS, st.integers(1, 7) | st.none(), st.sampled_from(["own", "min"]))
def test_every_row_runs_once_with_its_like(rows: list[tuple[int, int, int, int]], size: int | None, merge: str) -> None:
    made = [
        Row(_request(str(i), (prefix,) * 40 + (5,) * rest, index=i), 0, 40, 50, boundary)
        for i, (prefix, _, rest, boundary) in enumerate(rows)
    ]
    cache = CacheConfig(batch_boundary=merge)  # type: ignore[arg-type]
    batches = plan_batches(made, mask_id=1, cache=cache, batch_size=size)
    assert sorted(row.request.id for batch in batches for row in batch.rows) == sorted(row.request.id for row in made)
    for batch in batches:
        assert len(batch.rows) <= (size or 64)
        assert len(set(batch.prefixes)) == len(batch.prefixes)
        assert [batch.prefixes[index] for index in batch.prefix_index] == [row.prefix for row in batch.rows]
        assert len({length_bucket(row.suffix_len) for row in batch.rows}) == 1
        assert batch.boundary == min(row.boundary for row in batch.rows)
        if merge == "own":
            assert {row.boundary for row in batch.rows} == {batch.boundary}
    assert plan_batches(made[::-1], mask_id=1, cache=cache, batch_size=size) == batches


@hypothesis.given(st.integers(0, 200_000))
def test_buckets_hold_what_they_are_for_and_waste_little(size: int) -> None:
    assert length_bucket(size) >= size and count_bucket(size) >= size and width_bucket(size) >= size
    assert length_bucket(size + 1) >= length_bucket(size) and count_bucket(size + 1) >= count_bucket(size)
    assert length_bucket(length_bucket(size)) == length_bucket(size)
    if size > 256:
        assert length_bucket(size) <= size * 1.25
    if size > 1:
        assert count_bucket(size) <= size * 1.5
    assert layer_bucket(size, 30) <= 30 and layer_bucket(min(size, 30), 30) >= min(size, 30)
    assert length_bucket(0) == 0 and layer_bucket(0, 30) == 0


def test_rows_of_many_lengths_share_a_batch_unless_blocks_are_cached() -> None:
    made = []
    for index, (length, steps) in enumerate([(8, 8), (12, 12), (16, 16), (12, 6), (10, 10)]):
        sampling = SamplingConfig(gen_length=length, steps=steps, block_length=4, seed=index)
        made.append(Row(Request(f"{index}", (5,) * 20, 16, sampling, index=index), 0, 16, 50, 2))

    def sizes(**cache: object) -> list[int]:
        return sorted(len(batch.rows) for batch in plan_batches(made, mask_id=1, cache=CacheConfig(**cache)))  # type: ignore[arg-type]

    assert sizes() == [1, 1, 3]  # apart are two steps for a block of four, and a last block of two
    assert sizes(block_cache="prefix") == [1] * 5
