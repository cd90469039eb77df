"""A sweep: the jobs of ``-m`` one after another, each in a process of its own, and a table of how they ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.table import Table

from automodel.config import load_config
from automodel.launch.run_id import default_run_id
from automodel.logs import console, get_logger
from automodel.types import ExitStatus

log = get_logger(__name__)

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class _Job:
    """One job of a sweep.

    Attributes:
        overrides: its command line.
        swept: those of the overrides that other jobs do not share.
        run_id: of its run, which writes to ``folder``.
    """

    overrides: list[str]
    swept: str
    run_id: str
    folder: Path


def run_sweep(command_lines: Sequence[list[str]]) -> int:
    """Run every job, show how each ended, and return the sweep's status.

    A job that fails does not keep the others from running; a signal ends the sweep with the job in hand. The status
    is 75 after a signal, else 1 where a job did not end with 0.
    """
    jobs = _jobs(command_lines)
    log.info("a sweep of %d jobs:\n%s", len(jobs), "\n".join(f"  {job.swept}" for job in jobs))
    statuses: list[int] = []
    with _signals_for_the_job() as stop:
        for number, job in enumerate(jobs, start=1):
            if stop.signal is not None:
                break
            log.info("job %d of %d: %s", number, len(jobs), job.swept)
            command = [sys.executable, "-m", "automodel.run", *job.overrides]
            stop.child = subprocess.Popen(command, env=os.environ | {"AUTOMODEL_RUN_ID": job.run_id})
            statuses.append(stop.child.wait())
    console.print(_table(jobs, statuses))
    if stop.signal is not None:
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


class _Stop:
    def __init__(self) -> None:
        self.signal: int | None = None
        self.child: subprocess.Popen[bytes] | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        # A terminal sends Ctrl-C to the job as well, which saves and ends; other signals reach this process alone.
        if number != signal.SIGINT and self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


@contextmanager
def _signals_for_the_job() -> Iterator[_Stop]:
    """Leave it to the job in hand to save and end on a signal, instead of killing it."""
    stop = _Stop()
    before = {number: signal.signal(number, stop.handle) for number in _STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _table(jobs: Sequence[_Job], statuses: Sequence[int]) -> Table:
    table = Table("job", "ended", "loss", "validation", "folder")
    for column in table.columns:
        column.overflow = "fold"
    for index, job in enumerate(jobs):
        ended = _in_words(statuses[index]) if index < len(statuses) else "not run"
        losses = _last_losses(job.folder / "metrics.jsonl") if index < len(statuses) else {}
        figures = [f"{losses[kind]:.4f}" if kind in losses else "" for kind in ("train", "validation")]
        table.add_row(job.swept, ended, *figures, str(job.folder))
    return table


def _in_words(status: int) -> str:
    words = {ExitStatus.DONE: "done", ExitStatus.BAD_INPUT: "wrong input", ExitStatus.STOPPED: "stopped, saved"}
    return words.get(status, f"failed ({status})")


def _last_losses(metrics: Path) -> dict[str, float]:
    """Return the last loss of every kind of record."""
    if not metrics.exists():
        return {}
    records = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    return {record["kind"]: record["loss"] for record in records}
