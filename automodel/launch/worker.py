"""What a worker process owes its launcher: to end with it, and to say how it ended."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from automodel.screen import clear_screen_lines
from automodel.secrets import masked_text

STATUS_DIR = "AUTOMODEL_STATUS_DIR"
LAUNCHER_PID = "AUTOMODEL_LAUNCHER_PID"
DELIBERATE = (0, 2, 75)
"""Statuses of a run that ended as it meant to, and must not be restarted."""

_PR_SET_PDEATHSIG = 1


def is_worker(env: Mapping[str, str]) -> bool:
    """Return whether a launcher (torchrun, a SLURM step, ours) started this process as one rank of a job."""
    return "RANK" in env or ("SLURM_PROCID" in env and "SLURM_STEP_ID" in env)


def die_with_launcher() -> None:
    """Have the kernel kill this worker when our launcher dies, even by SIGKILL (Linux)."""
    if LAUNCHER_PID not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER_PID]):  # it died before we asked
        os._exit(1)


def tell_failure(text: str) -> None:
    """Show what went wrong on this rank: under our launcher at the end of the whole run, else at once.

    What is told first counts; the rest only follows from it.
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
    """Return (rank, text) of the failure told first under ``folder``, or None."""
    told = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
    return (int(told[0].name.rpartition("-")[2]), told[0].read_text()) if told else None


def leave(status: int) -> NoReturn:
    """End this process with ``status`` at once.

    Interpreter shutdown is left out: a gloo thread that drops its last tensor during it aborts the process in
    some of its runs. Under our launcher a deliberate end is written down and the agent sees 0, so that it
    restarts nothing.
    """
    status = int(status)
    clear_screen_lines()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    folder = os.environ.get(STATUS_DIR)
    if folder and status in DELIBERATE:
        (Path(folder) / f"rank-{os.environ.get('RANK', '0')}").write_text(str(status))
        status = 0
    os._exit(status)
