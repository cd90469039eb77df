"""What a worker process owes its launcher: to end with it, and to report how it ended."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from automodel.environment import has_slurm_ranks
from automodel.screen import clear_screen_lines
from automodel.secrets import masked_text

STATUS_DIR = "AUTOMODEL_STATUS_DIR"
LAUNCHER_PID = "AUTOMODEL_LAUNCHER_PID"
DELIBERATE = (0, 2, 75)
"""Statuses of a run that ended as it meant to, and must not be restarted."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def is_worker(env: Mapping[str, str]) -> bool:
    """Return whether a launcher (torchrun, a SLURM step, ours) started this process as one rank of a job."""
    return "RANK" in env or has_slurm_ranks(env)


def die_with_launcher() -> None:
    """Have the kernel kill this worker when our launcher dies, even by SIGKILL (Linux)."""
    if LAUNCHER_PID not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER_PID]):  # it died before we asked
        os._exit(1)


def report_failure(text: str) -> None:
    """Show what went wrong on this rank: under our launcher at the end of the whole run, else at once.

    Only the first report of a rank counts; later failures follow from it.
    """
    clear_screen_lines()
    text, folder = masked_text(text), os.environ.get(STATUS_DIR)
    if folder and Path(folder).is_dir():
        file = Path(folder) / f"failure-{os.environ.get('RANK', '0')}"
        if not file.exists():
            file.write_text(text)
    else:
        print(text, file=sys.stderr, flush=True)


def first_failure(folder: Path) -> tuple[int, str] | None:
    """Return (rank, text) of the first failure reported under ``folder``, or None."""
    reports = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
    return (int(reports[0].name.rpartition("-")[2]), reports[0].read_text()) if reports else None


def exit_process(status: int) -> NoReturn:
    """End this process with ``status`` at once.

    Interpreter shutdown is skipped: a gloo thread that drops its last tensor during it sometimes aborts the process.
    Under our launcher a deliberate end is written down and the agent sees 0, so it restarts nothing.
    """
    clear_screen_lines()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    folder = os.environ.get(STATUS_DIR)
    if folder and status in DELIBERATE:
        (Path(folder) / f"rank-{os.environ.get('RANK', '0')}").write_text(str(int(status)))
        status = 0
    os._exit(status)
