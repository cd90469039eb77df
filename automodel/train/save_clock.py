"""When a checkpoint is due by the clock, so that a killed run loses minutes whatever the length of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable

_LEAST_SEC, _MOST_SEC = 60.0, 1800.0
_SHARE_OF_SAVES = 0.1
"""Of the time: saves that take a second come every minute, those that take a minute every ten."""


class SaveClock:
    """Measures the time since the last save; one rank asks it, and tells the others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def is_due(self, *, save_sec: float) -> bool:
        """Return whether it is time for a save, given how long the last one took (0 before the first)."""
        interval = min(max(save_sec / _SHARE_OF_SAVES, _LEAST_SEC), _MOST_SEC)
        return self._clock() - self._last >= interval

    def restart(self) -> None:
        """Measure from now on."""
        self._last = self._clock()
