"""What a person sees of slow work: the phase that a run is in, and how far it has come.

On a terminal, live lines at the bottom of the screen; elsewhere, and in ``train.log``, ordinary log lines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from automodel.logs import console, get_logger, speaks_for_all

log = get_logger(__name__)

_SECONDS_BETWEEN_LINES = 60.0
"""Without a terminal: often enough to see that a long phase moves, seldom enough not to fill a job's log."""


@dataclass
class Bar:
    """How far a piece of counted work is: a bar on a terminal, a line a minute elsewhere, nothing on other ranks.

    Attributes:
        total: None where it is not known beforehand.
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


class _Count(ProgressColumn):
    """Items done and how long the rest may take; for work that is not counted, the seconds it has taken."""

    def render(self, task: Task) -> Text:
        if task.fields["is_phase"]:
            return Text(f"{task.elapsed or 0:.0f} s")
        if task.total is None:
            return Text(f"{task.completed:,.0f}")
        left = "" if task.time_remaining is None else f"  {_clock(task.time_remaining)} left"
        return Text(f"{task.completed:,.0f}/{task.total:,.0f}{left}")


class _BarIfCounted(BarColumn):
    def render(self, task: Task) -> Text:
        return Text("") if task.fields["is_phase"] else super().render(task)


class _Screen:
    """The live lines of this process; they exist only while there is something to show."""

    def __init__(self) -> None:
        self.live: Progress | None = None
        self._phase: TaskID | None = None

    def add(self, description: str, *, total: int | None, is_phase: bool) -> TaskID | None:
        if not speaks_for_all() or not console.is_terminal:
            return None
        if self.live is None:
            columns = (
                SpinnerColumn(), TextColumn("{task.description}"), _BarIfCounted(), _Count(),
                TextColumn("{task.fields[text]}"),
            )  # fmt: skip
            self.live = Progress(*columns, console=console, transient=True, refresh_per_second=5)
            self.live.start()
        return self.live.add_task(description, total=total, text="", is_phase=is_phase)

    def remove(self, task: TaskID | None) -> None:
        if task is None or self.live is None:
            return
        self.live.remove_task(task)
        if not self.live.tasks:
            self.close()

    def set_phase(self, description: str | None) -> None:
        before, self._phase = self._phase, None
        if description is not None:
            self._phase = self.add(description, total=None, is_phase=True)
        self.remove(before)

    def close(self) -> None:
        live, self.live, self._phase = self.live, None, None
        if live is not None:
            live.stop()


_screen = _Screen()


def show_phase(description: str) -> None:
    """Say on rank 0 what the run does from now on, until the next phase or the next counted work."""
    log.info("%s", description)
    _screen.set_phase(description)


@contextmanager
def progress(total: int | None, *, description: str, is_logged: bool = True) -> Iterator[Bar]:
    """Show on rank 0 how far the block is; bars may be inside one another."""
    _screen.set_phase(None)
    bar = Bar(description, total, is_logged, _screen.add(description, total=total, is_phase=False))
    try:
        yield bar
    finally:
        _screen.remove(bar.task)


def clear_screen_lines() -> None:
    """Take the live lines off the terminal and give it its cursor back; what ends the process calls it."""
    _screen.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
