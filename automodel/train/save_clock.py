"""When a checkpoint is due by the clock, so a killed run loses only minutes, however long its steps are."""

from __future__ import annotations

import time
from collections.abc import Callable

_LEAST_SEC, _MOST_SEC = 60.0, 1800.0
"""A minute of work costs little to repeat; half an hour is the most to lose."""
_SHARE_OF_SAVES = 0.1
"""The largest share of a run's time for saves: if a save takes a minute, there is one every ten minutes."""


class SaveClock:
    """Measures the time since the last save; one rank reads it for all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def is_due(self, *, save_sec: float) -> bool:
        """Return whether it is time for a save, given how long the last one took (0 before the first)."""
        interval = min(max(save_sec / _SHARE_OF_SAVES, _LEAST_SEC), _MOST_SEC)
        return self._clock() - self._last >= interval

    def restart(self) -> None:
        """Start measuring from now."""
        self._last = self._clock()
