"""Set-up of every test: JAX on the CPU, no file outside the temporary folder."""

import os
import tempfile
from pathlib import Path

# These must stand in the environment before anything imports jax, and reach the commands that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_CACHE = tempfile.TemporaryDirectory(prefix="bicache-tests-")  # removed when the interpreter ends
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # a checkout needs no installation to be tested

import hypothesis  # noqa: E402

# A first example compiles, and CI shares its cores: wall time says nothing about a property.
hypothesis.settings.register_profile("bicache", deadline=None)
hypothesis.settings.load_profile("bicache")
