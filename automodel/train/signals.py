"""Turn the signals of a user or a scheduler into a request to stop after the step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_early: list[str] = []
_serves_one_run = False


def serve_one_run() -> None:
    """Make ready a process that is one rank of one run and ends with it, for good.

    A scheduler's USR1 does not kill a run that still starts, or already exports: before training it is a request to
    stop after the first step. TERM does not kill one whose training failed: a launcher sends it to the peers of a
    rank that died, just when they are about to say which one that was.
    """
    global _serves_one_run
    _serves_one_run = True
    signal.signal(signal.SIGUSR1, lambda number, frame: _early.append(signal.Signals(number).name))


class StopRequest:
    """Context that notes the first stop signal; a second Ctrl-C interrupts at once.

    Handlers are put back, but for what ``serve_one_run`` says.
    """

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
            is_kept_off = _serves_one_run and error is not None and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if is_kept_off else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
