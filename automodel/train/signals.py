"""Turn the signals of a user or a scheduler into a request to stop after the step."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from types import FrameType, TracebackType

from automodel.processes import signal_handler

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_early: list[str] = []
_serves_one_run = False


def serve_one_run() -> None:
    """Set up the signals of a process that is one rank of one run and ends with it.

    A scheduler's USR1 does not kill a run that is starting or exporting; before training it asks for a stop after the
    first step. TERM does not kill a run whose training failed: a launcher sends it to the peers of a dead rank, just
    when they are about to report which rank died.
    """
    global _serves_one_run
    _serves_one_run = True
    signal.signal(signal.SIGUSR1, lambda signum, frame: _early.append(signal.Signals(signum).name))


class StopRequest:
    """Context that records stop signals instead of ending the process; a second Ctrl-C interrupts at once.

    On exit it restores the earlier handlers, except that of TERM after a failure: see ``serve_one_run``.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = _early[0] if _early else None
        self._handlers = ExitStack()

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        self._handlers.enter_context(signal_handler(self._note, *STOP_SIGNALS))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handlers.close()
        if _serves_one_run and error is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(signum).name
