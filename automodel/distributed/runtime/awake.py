"""Time as this process lived through it: it stands still while the process is stopped.

A scheduler suspends a job by stopping its processes (SIGSTOP) and may continue them hours later. The system's clocks
run on meanwhile, so every wait measured by them would be over at that moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

LONGEST_GAP_SEC = 5.0
"""The most that passes between two readings: longer than a busy machine delays a thread that reads once a second."""


class AwakeClock:
    """A clock for a thread that reads it every second or so; a longer gap means that the process was stopped."""

    def __init__(self) -> None:
        self._read_at = time.monotonic()
        self._awake_sec = 0.0

    def read(self) -> float:
        """Return the seconds since the clock was made, without those of a stop."""
        now = time.monotonic()
        self._awake_sec += min(now - self._read_at, LONGEST_GAP_SEC)
        self._read_at = now
        return self._awake_sec


def poll_for(seconds: float) -> Iterator[float]:
    """Yield the seconds passed, with pauses that grow from 10 ms to 0.5 s, until ``seconds`` are over.

    The pauses are plain sleeps, which Ctrl-C interrupts.
    """
    clock, pause_sec = AwakeClock(), 0.01
    while (passed_sec := clock.read()) < seconds:
        yield passed_sec
        time.sleep(min(pause_sec, max(seconds - passed_sec, 0)))
        pause_sec = min(1.5 * pause_sec, 0.5)
