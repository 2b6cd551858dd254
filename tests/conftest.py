"""Set-up of every test: JAX on the CPU, no file outside the temporary folder."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# These must stand in the environment before anything imports jax, and reach the commands that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests wait for the compiler, not for tiny models: unoptimised code compiles in half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
_CACHE = tempfile.TemporaryDirectory(prefix="bicache-tests-")  # removed when the interpreter ends
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# Two test processes, and the commands that tests start, compile the same programs: whoever is first keeps them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name + "/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# A shell starts background jobs deaf to Ctrl-C, and the commands that tests interrupt would inherit it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # a checkout needs no installation to be tested

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# A first example compiles, and CI shares its cores: wall time says nothing about a property.
hypothesis.settings.register_profile("bicache", deadline=None)
hypothesis.settings.load_profile("bicache")

MAPPINGS = 30_000  # Linux allows a process 65,530, and every compiled program holds some for as long as it is kept


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    """Drops compiled programs before there are so many that the compiler gets no more memory, and aborts."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is only run on request is slow too, so that `-m 'not slow'` leaves it out."""
    for item in items:
        if item.get_closest_marker("full") is not None:
            item.add_marker(pytest.mark.slow)
