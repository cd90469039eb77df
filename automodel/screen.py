"""What a person sees of slow work: the current phase of a run, and its progress.

On a terminal, live lines at the bottom of the screen; elsewhere, and in ``train.log``, ordinary log lines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from automodel.logs import console, get_logger, speaks_for_all

log = get_logger(__name__)

_SECONDS_BETWEEN_LINES = 60.0
"""Without a terminal: often enough to see that a long phase moves, seldom enough not to fill a job's log."""


@dataclass
class Bar:
    """The progress of counted work: a bar on a terminal, a line a minute elsewhere, nothing on other ranks.

    Attributes:
        total: None if it is not known beforehand.
        is_logged: whether it writes lines where there is no terminal.
    """

    description: str
    total: int | None
    is_logged: bool
    task: TaskID | None = None
    _started_at: float = field(default_factory=lambda: time.monotonic())
    _last_line_at: float = field(default_factory=lambda: time.monotonic())

    def update(self, done: int, text: str = "") -> None:
        """Show that ``done`` items are done, with a few words."""
        if self.task is not None and _screen.live is not None:
            _screen.live.update(self.task, completed=done, text=text)
        now = time.monotonic()
        if self.is_logged and now - self._last_line_at >= _SECONDS_BETWEEN_LINES:
            self._last_line_at = now
            out_of = f" of {self.total:,}" if self.total is not None else ""
            log.info("%s: %s%s in %.0f s", self.description, f"{done:,}", out_of, now - self._started_at)


class _Screen:
    """The live lines of this process, a phase or any number of bars; they exist only while there is work to show."""

    def __init__(self) -> None:
        self.live: Progress | None = None
        self._is_phase = False

    def add(self, description: str, *, total: int | None = None, is_phase: bool = False) -> TaskID | None:
        if not speaks_for_all() or not console.is_terminal:
            return None
        if self._is_phase:
            self.close()
        if self.live is None:
            counts = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
            columns = (TextColumn("{task.description}"), *((TimeElapsedColumn(),) if is_phase else counts))
            text = TextColumn("{task.fields[text]}")
            self.live = Progress(SpinnerColumn(), *columns, text, console=console, transient=True, refresh_per_second=5)
            self.live.start()
            self._is_phase = is_phase
        elif is_phase:
            return None  # the bars say more
        return self.live.add_task(description, total=total, text="")

    def remove(self, task: TaskID | None) -> None:
        if task is None or self.live is None:
            return
        self.live.remove_task(task)
        if not self.live.tasks:
            self.close()

    def close(self) -> None:
        live, self.live, self._is_phase = self.live, None, False
        if live is not None:
            live.stop()


_screen = _Screen()


def show_phase(description: str) -> None:
    """Show on rank 0 what the run does from now on, until the next phase or the next counted work."""
    log.info("%s", description)
    _screen.add(description, is_phase=True)


@contextmanager
def progress(total: int | None, *, description: str, is_logged: bool = True) -> Iterator[Bar]:
    """Show the progress of the block on rank 0; bars may be inside one another."""
    bar = Bar(description, total, is_logged, _screen.add(description, total=total))
    try:
        yield bar
    finally:
        _screen.remove(bar.task)


def clear_screen_lines() -> None:
    """Remove the live lines from the terminal and give it its cursor back, before the process ends."""
    _screen.close()
