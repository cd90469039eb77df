"""Slow work is named and counted: live lines on a terminal, log lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from automodel import logs, screen
from automodel.logs import get_logger, setup_logging
from automodel.screen import clear_screen_lines, progress, show_phase


@pytest.fixture
def terminal(monkeypatch):
    """Let what is printed go to a terminal of 80 columns, and return what it was sent."""
    written = io.StringIO()
    fake = Console(file=written, force_terminal=True, width=80)
    monkeypatch.setattr(logs, "console", fake)
    monkeypatch.setattr(screen, "console", fake)
    setup_logging(0)
    yield written
    clear_screen_lines()


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that only moves by hand."""
    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_every_phase_is_a_line_and_long_work_a_line_a_minute(capsys, clock):
    setup_logging(0)
    show_phase("loading the model")
    with progress(4000, description="validation") as bar:
        for done in range(1, 5):
            clock[0] += 40
            bar.update(1000 * done)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["loading the model", "validation: 2,000 of 4,000 in 80 s", "validation: 4,000 of 4,000 in 160 s"]


def test_work_that_logs_by_itself_writes_no_lines_of_its_own(capsys, clock):
    setup_logging(0)
    with progress(10, description="training", is_logged=False) as bar:
        clock[0] += 1000
        bar.update(5, "loss 1.0")
    assert capsys.readouterr().err == ""


def test_other_ranks_show_nothing(capsys, clock):
    setup_logging(1)
    show_phase("loading the model")
    with progress(10, description="validation") as bar:
        clock[0] += 1000
        bar.update(5)
    assert capsys.readouterr().err == ""
    setup_logging(0)


def test_on_a_terminal_the_phase_counts_seconds_and_work_its_items(terminal):
    show_phase("loading the model")
    screen._screen.live.refresh()
    assert "loading the model" in terminal.getvalue() and "0:00:00" in terminal.getvalue()
    with progress(3, description="training") as training:
        with progress(7, description="validation") as bar:
            bar.update(5)
            screen._screen.live.refresh()
            assert {task.description for task in screen._screen.live.tasks} == {"training", "validation"}
        training.update(2, "loss 0.5")
        screen._screen.live.refresh()
    assert "5/7" in terminal.getvalue() and "2/3" in terminal.getvalue() and "loss 0.5" in terminal.getvalue()


def test_a_process_that_ends_in_the_middle_gives_the_terminal_its_cursor_back(terminal):
    show_phase("loading the model")
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert terminal.getvalue().rindex(hidden) > terminal.getvalue().rfind(shown)
    clear_screen_lines()
    assert terminal.getvalue().rindex(shown) > terminal.getvalue().rindex(hidden)
    get_logger("automodel.x").info("the last word")
    assert terminal.getvalue().rstrip().endswith("the last word")
