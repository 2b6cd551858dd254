"""Configurations refuse what is of another type or out of range, in words that name the field."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest

from bicache_jax.core.boundary import BoundaryTable
from bicache_jax.core.config import CacheConfig, SamplingConfig
from bicache_jax.serving.frames import Frames


def make(config: Any, **fields: Any) -> Any:
    """A configuration as a user makes it, without the checker of the tests."""
    made = copy.copy(config)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    inspect.unwrap(type(made).__post_init__)(made)
    return made


@pytest.mark.parametrize(
    ("config", "fields", "kind", "words"),
    [
        (SamplingConfig(), {"gen_length": "8"}, TypeError, "gen_length must be an integer, got '8'"),
        (SamplingConfig(), {"steps": 2.0}, TypeError, "steps must be an integer or None, got 2.0"),
        (SamplingConfig(), {"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        (SamplingConfig(), {"early_stop": 1}, TypeError, "early_stop must be True or False, got 1"),
        (SamplingConfig(), {"remasking": 3}, TypeError, "remasking must be 'low_confidence' or .* or None, got 3"),
        (SamplingConfig(), {"remasking": "rnd"}, ValueError, "remasking must be one of low_confidence"),
        (CacheConfig(), {"refresh_interval": True}, TypeError, "refresh_interval must be an integer or 'auto'"),
        (CacheConfig(), {"refresh_interval": "often"}, ValueError, "refresh_interval must be 'auto' or an integer"),
        (CacheConfig(), {"boundary": 2.5}, TypeError, "boundary must be an integer or 'auto', got 2.5"),
        (CacheConfig(), {"boundary": -1}, ValueError, "boundary must be 'auto' or an integer >= 0, got -1"),
        (CacheConfig(), {"cache_dtype": "int4"}, ValueError, "cache_dtype must be one of auto, int8, got 'int4'"),
        (CacheConfig(), {"table": [1, 2]}, TypeError, "table must be a mapping or None"),
        (CacheConfig(), {"table": {"5": 2}}, TypeError, "table must map ratios in percent to boundaries, got '5': 2"),
        (
            CacheConfig(),
            {"policy": None},
            TypeError,
            "policy must be 'auto' or 'none' or 'naive' or 'bicache' or 'exact', got None",
        ),
    ],
)
def test_fields_of_another_type(config: Any, fields: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make(config, **fields)


def test_numbers_of_numpy_are_numbers() -> None:
    found = make(SamplingConfig(), gen_length=np.int64(8), temperature=np.float32(0.5))
    assert found == SamplingConfig(8, temperature=0.5) and hash(found) == hash(SamplingConfig(8, temperature=0.5))
    assert type(found.gen_length) is int and make(CacheConfig(), boundary=np.int32(3)) == CacheConfig(boundary=3)


@pytest.mark.parametrize(
    ("every", "kind"), [(-1, ValueError), (0, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_frames_come_every_so_many_whole_steps(every: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="every must be"):
        inspect.unwrap(Frames.__init__)(copy.copy(Frames()), every)


def test_boundary_tables_have_a_hash() -> None:
    first, second = (BoundaryTable("m", "f", 4, 0.97, 1, {0: 1, 50: 3}) for _ in range(2))
    assert first == second and hash(first) == hash(second)
