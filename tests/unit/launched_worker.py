"""A worker without torch that ends as its first argument says; the launcher's tests start it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from automodel.launch.worker import die_with_launcher, exit_process


def main(how: str, folder: Path) -> None:
    """End as ``how`` says, and leave a file for every start of this rank in ``folder``."""
    die_with_launcher()
    rank = os.environ["RANK"]
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    facts = (os.environ["AUTOMODEL_RUN_ID"], os.environ["OMP_NUM_THREADS"], str(os.getpid()))
    (folder / f"rank-{rank}-start-{attempt}").write_text(" ".join(facts))
    is_last, is_first_start = rank == "1", attempt == "0"
    while is_last and not (folder / f"rank-0-start-{attempt}").exists():
        time.sleep(0.01)  # the first failure ends the others, which may not have started yet
    if how.isdigit() and (is_last or how == "0"):
        exit_process(int(how))
    elif how == "raise" and is_last:
        raise ValueError("went wrong on purpose")
    elif how == "raise-once" and is_last and is_first_start:
        raise ValueError("went wrong the first time")
    elif how == "killed" and is_last:
        os.kill(os.getpid(), signal.SIGKILL)
    elif how in ("raise", "killed", "wait", "stubborn") or (how == "raise-once" and is_first_start):
        wait_for_a_signal(folder, is_stubborn=how == "stubborn")
    exit_process(0)


def wait_for_a_signal(folder: Path, *, is_stubborn: bool) -> None:
    """Take a moment after a stop signal, as a worker does that saves, and leave with 75."""
    noted: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: noted.append(number))
    (folder / f"rank-{os.environ['RANK']}-ready").touch()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (is_stubborn or not noted):
        time.sleep(0.02)
        if noted:
            (folder / f"rank-{os.environ['RANK']}-signalled").touch()
    time.sleep(0.3)
    exit_process(75)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
