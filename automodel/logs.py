"""Logging: rank 0 speaks, other ranks only warn; a progress bar where there is a terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_ROOT = "automodel"
_is_main = True  # until setup_logging says otherwise
_console = Console(stderr=True, soft_wrap=True, highlight=False)


class _ConsoleHandler(logging.Handler):
    """Prints through the console that also draws the progress bar, so that they do not garble each other."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            style = "yellow" if record.levelno >= logging.WARNING else None
            _console.print(self.format(record), style=style, markup=False)
        except Exception:
            self.handleError(record)


class Bar:
    """A progress bar, or nothing where there is no terminal."""

    def __init__(self, bar: Progress | None, task: int | None) -> None:
        self._bar, self._task = bar, task

    def update(self, done: int, text: str) -> None:
        """Show that ``done`` steps are done, with a few words."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)


def get_logger(name: str) -> logging.Logger:
    """Return the logger of one of our modules."""
    return logging.getLogger(name)


def warn_for_all(logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning that every rank comes to alike: rank 0 speaks."""
    if _is_main:
        logger.warning(message, *args)


def setup_logging(rank: int, log_file: Path | None = None) -> None:
    """Send our log lines to the screen, and on rank 0 to ``log_file``; calling again begins anew."""
    global _is_main
    _is_main = rank == 0
    root = logging.getLogger(_ROOT)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handler = _ConsoleHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
    if log_file is not None and rank == 0:
        add_log_file(log_file)
    _quieten_libraries()


def add_log_file(path: Path) -> None:
    """Write our log lines to ``path`` too, appending."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger(_ROOT).addHandler(handler)


@contextmanager
def progress(total: int | None, *, description: str) -> Iterator[Bar]:
    """Show a progress bar for the block, if this is rank 0 on a terminal."""
    is_quiet = logging.getLogger(_ROOT).level > logging.INFO
    if is_quiet or not _console.is_terminal:
        yield Bar(None, None)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    with Progress(*columns, console=_console, transient=True) as bar:
        yield Bar(bar, bar.add_task(description, total=total, text=""))


def _quieten_libraries() -> None:
    """Keep the chatter of libraries off the screen; their warnings stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("transformers", "datasets", "httpx", "filelock", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
