"""Start many short runs on two ranks, and count how they end: gloo's threads like to abort a process that exits.

python -m benchmarks.short_runs [NUM_RUNS]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ARGV = (
    "evaluation=loss", "validation_dataset=none", "dataset.limit=64", "step_scheduler.local_batch_size=8",
    "step_scheduler.global_batch_size=16", "step_scheduler.max_steps=2", "launch.nproc_per_node=2",
    "checkpoint.enabled=false", "export.enabled=false",
)  # fmt: skip


def main() -> None:
    num_runs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    outcomes: Counter[str] = Counter()
    start = time.monotonic()
    for _ in range(num_runs):
        with tempfile.TemporaryDirectory() as folder:
            argv = [sys.executable, "-m", "automodel.run", *ARGV, f"output_dir={folder}/run"]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            metrics = Path(folder) / "run" / "metrics.jsonl"
            steps = metrics.read_text().count('"kind": "train"') if metrics.exists() else 0
        noise = [line for line in done.stderr.splitlines() if "terminate called" in line or "Traceback" in line]
        outcome = f"status {done.returncode}, {steps} steps{', ' + noise[0] if noise else ''}"
        outcomes[outcome] += 1
    for outcome, number in outcomes.most_common():
        print(f"{number:4} of {num_runs}: {outcome}")
    print(f"{(time.monotonic() - start) / num_runs:.1f} s a run")


if __name__ == "__main__":
    main()
