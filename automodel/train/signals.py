"""Turn the signals of a user or a scheduler into a request to stop after the step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_early: list[str] = []


def keep_early_usr1() -> None:
    """Keep a scheduler's USR1 from killing a run that still starts, or already exports.

    One that comes before training is a request to stop after the first step. Replaces this process's handler for good.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: _early.append(signal.Signals(number).name))


class StopRequest:
    """Context that notes the first stop signal; a second Ctrl-C interrupts at once. Handlers are put back."""

    def __init__(self) -> None:
        self.signal_name: str | None = _early[0] if _early else None
        self._previous: dict[int, object] = {}

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
