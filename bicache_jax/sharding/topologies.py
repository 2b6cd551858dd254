"""TPU slices that are not attached, as libtpu's compiler describes them, and its output to standard error."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from bicache_jax.core.libtpu import expect_no_tpu
from bicache_jax.core.types import BicacheError

_SLICE = re.compile(r"(?P<generation>\w+):(?P<sides>[1-9]\d*(?:x[1-9]\d*){0,2})(?P<wiring>_twisted|_untwisted)?")
FORMS = "a slice is named by its sides in chips, as in v5e:1x1, v5e:2x4 or v5p:2x2x1"


def slice_name(name: str) -> str:
    """The TPU compiler's name for a slice: `v5e:2x4` is unchanged, `v5e:1` becomes `v5e:1x1`.

    The compiler aborts the process if a side is 0, so names are checked first.

    Raises:
        BicacheError: the name has a different form.
    """
    found = _SLICE.fullmatch(name)
    if found is None or (found["sides"].isdecimal() and found["sides"] != "1"):
        raise BicacheError(f"topology {name!r}: {FORMS}")
    return f"{found['generation']}:1x1" if found["sides"] == "1" else name


def slice_devices(name: str) -> Sequence[Any]:
    """Devices of a slice, as the TPU compiler describes them; the slice need not be attached.

    Args:
        name: the slice, as `slice_name` takes it.

    Raises:
        BicacheError: the name is wrong, the compiler is not installed, or it does not know the slice.
    """
    wanted = slice_name(name)
    expect_no_tpu()
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=wanted).devices
    except Exception as error:  # the compiler's own errors have no common type
        if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise BicacheError(
                f"topology {name!r}: there is no TPU compiler here; install it: pip install libtpu"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BicacheError(f"topology {name!r}: the TPU compiler refuses it ({reason}); {FORMS}") from None


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Holds back what compilers write to standard error's file descriptor, and shows it if the block raises."""
    if sys.stderr is None:  # the descriptor is closed or belongs to another file
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(before, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
