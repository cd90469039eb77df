"""Measure what a user waits for: the help, the check of a wrong command line, the first step of the default.

Prints the median and the range of each over several runs; every run is a process of its own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from automodel.runs.records import read_records

NUM_RUNS = 5


def seconds(*argv: str) -> float:
    """Return the wall time of one command line."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "automodel.run", *argv], capture_output=True, check=False)
    return time.perf_counter() - start


def seconds_to_first_step() -> float:
    """Return the time from the start of the process to the first logged step, evaluation before it included."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        argv = ["step_scheduler.max_steps=1", f"output_dir={folder}/run"]
        subprocess.run([sys.executable, "-m", "automodel.run", *argv], capture_output=True, check=True)
        first = read_records(Path(folder) / "run" / "metrics.jsonl", "train")[0]
    return datetime.fromisoformat(first["timestamp"]).timestamp() - start


def main() -> None:
    """Print one line a measurement."""
    measured = {
        "--help": lambda: seconds("--help"),
        "a wrong key": lambda: seconds("step_scheduler.max_step=3"),
        "start to first step": seconds_to_first_step,
    }
    for name, measure in measured.items():
        times = sorted(measure() for _ in range(NUM_RUNS))
        print(f"{name:<22}median {statistics.median(times):6.2f} s   range {times[0]:.2f} to {times[-1]:.2f} s")


if __name__ == "__main__":
    main()
