"""How often a caller sees the canvases while they are denoised: by steps, or by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

from bicache_jax.serving.fields import is_int

SECONDS = 0.1
"""Between frames that the clock decides: as quick as an eye needs, seldom enough to cost little."""


class Frames:
    """Chooses how many steps the next dispatch makes; the number is traced, so that none compiles.

    Attributes:
        steps: denoising steps until the next frame.
    """

    def __init__(
        self, every: int | None = None, *, seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Begins to count.

        Args:
            every: steps between frames; None: as many as take about `seconds`, one at first.
            seconds: time between frames.
            clock: tells the time.

        Raises:
            TypeError: `every` is not an integer.
            ValueError: it is below 1, or `seconds` is negative.
        """
        if every is not None and not is_int(every):
            raise TypeError(f"every must be an integer or None, got {every!r:.80}")
        if every is not None and every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        if not seconds >= 0:
            raise ValueError(f"seconds between frames must be >= 0, got {seconds!r:.80}")
        self._every, self._seconds, self._clock = every, seconds, clock
        self._last: float | None = None  # the time of the frame before
        self.steps = every or 1

    def shown(self) -> None:
        """A frame has been shown, and the caller has seen it."""
        now = self._clock()
        if self._every is None and self._last is not None:
            took = max(now - self._last, 1e-9) / self.steps
            self.steps = max(1, min(int(self._seconds / took), 4 * self.steps))  # one slow step proves little
        self._last = now
