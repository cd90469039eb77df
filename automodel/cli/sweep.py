"""A sweep: the jobs of ``-m`` one after another, each in its own process, and a table of how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.table import Table

from automodel.config import load_config
from automodel.launch.run_id import default_run_id
from automodel.logs import console, get_logger
from automodel.processes import signal_handler
from automodel.runs.records import read_records
from automodel.types import ExitStatus

log = get_logger(__name__)

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_OUTCOMES = {ExitStatus.DONE: "done", ExitStatus.BAD_INPUT: "wrong input", ExitStatus.STOPPED: "stopped, saved"}


@dataclass(frozen=True)
class _Job:
    """One job of a sweep.

    Attributes:
        overrides: its command line.
        swept: the overrides that not all jobs share, for the screen.
        run_id: the id of its run, which writes to ``folder``.
    """

    overrides: list[str]
    swept: str
    run_id: str
    folder: Path


def run_sweep(command_lines: Sequence[list[str]]) -> int:
    """Run every job, show how each ended, and return the sweep's status.

    A job that fails does not keep the others from running; a signal ends the sweep with the current job, which saves.
    The status is 75 after a signal, else 1 if a job did not end with 0.
    """
    jobs = _jobs(command_lines)
    log.info("a sweep of %d jobs:\n%s", len(jobs), "\n".join(f"  {job.swept}" for job in jobs))
    statuses: list[int] = []
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        # A terminal sends Ctrl-C to the job as well; other signals reach this process alone.
        if signum != signal.SIGINT and child is not None and child.poll() is None:
            child.send_signal(signum)

    with signal_handler(pass_on, *_STOPS):
        for index, job in enumerate(jobs):
            if received:
                break
            log.info("job %d of %d: %s", index + 1, len(jobs), job.swept)
            command = [sys.executable, "-m", "automodel.run", *job.overrides]
            child = subprocess.Popen(command, env=os.environ | {"AUTOMODEL_RUN_ID": job.run_id})
            statuses.append(child.wait())
    console.print(_table(jobs, statuses))
    if received:
        return ExitStatus.STOPPED
    return ExitStatus.FAILED if any(statuses) else ExitStatus.DONE


def _jobs(command_lines: Sequence[list[str]]) -> list[_Job]:
    sweep_id = default_run_id()
    shared = set.intersection(*map(set, command_lines))
    jobs = []
    for index, line in enumerate(command_lines):
        cfg = load_config(line)
        run_id = f"{sweep_id}-{index}"
        folder = Path(cfg.output_dir) if cfg.output_dir else Path("outputs") / cfg.recipe.name / run_id
        swept = " ".join(arg for arg in line if arg not in shared and not arg.startswith("output_dir="))
        jobs.append(_Job(line, swept or "everything as given", run_id, folder))
    return jobs


def _table(jobs: Sequence[_Job], statuses: Sequence[int]) -> Table:
    table = Table("job", "ended", "loss", "validation", "folder")
    for column in table.columns:
        column.overflow = "fold"
    for job, status in zip(jobs, statuses, strict=False):
        losses = _last_losses(job.folder / "metrics.jsonl")
        figures = [f"{losses[kind]:.4f}" if kind in losses else "" for kind in ("train", "validation")]
        table.add_row(job.swept, _OUTCOMES.get(status, f"failed ({status})"), *figures, str(job.folder))
    for job in jobs[len(statuses) :]:
        table.add_row(job.swept, "not run", "", "", str(job.folder))
    return table


def _last_losses(metrics: Path) -> dict[str, float]:
    """Return the last loss of every kind of record."""
    return {record["kind"]: record["loss"] for record in read_records(metrics)}
