"""Start many short runs on two ranks, and count how they end: gloo's threads like to abort a process that exits.

    python -m benchmarks.short_runs [NUM_RUNS] [--fork]

With --fork the ranks are forked from a process that has imported everything, and leave as a run's workers do: start-up,
a few steps of DDP, the end of the group, and the exit.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from automodel.runs.records import read_records

ARGV = (
    "evaluation=loss", "validation_dataset=none", "dataset.limit=64", "step_scheduler.local_batch_size=8",
    "step_scheduler.global_batch_size=16", "step_scheduler.max_steps=2", "launch.nproc_per_node=2",
    "checkpoint.enabled=false", "export.enabled=false",
)  # fmt: skip


def main() -> None:
    numbers = [int(arg) for arg in sys.argv[1:] if arg.isdecimal()]
    num_runs = numbers[0] if numbers else 200
    outcomes: Counter[str] = Counter()
    start = time.monotonic()
    for _ in range(num_runs):
        outcomes[_forked_run() if "--fork" in sys.argv else _whole_run()] += 1
    for outcome, number in outcomes.most_common():
        print(f"{number:4} of {num_runs}: {outcome}")
    print(f"{(time.monotonic() - start) / num_runs:.1f} s a run")


def _whole_run() -> str:
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "automodel.run", *ARGV, f"output_dir={folder}/run"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        steps = len(read_records(Path(folder) / "run" / "metrics.jsonl", "train"))
    noise = [line for line in done.stderr.splitlines() if "terminate called" in line or "Traceback" in line]
    return f"status {done.returncode}, {steps} steps{', ' + noise[0] if noise else ''}"


def _forked_run() -> str:
    import torch
    import transformers  # noqa: F401 - so that the ranks need not import it

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        pid = os.fork()
        if not pid:
            torch.set_num_threads(1)
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            _train_a_little()
        ranks.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    return f"statuses {statuses}"


def _train_a_little() -> None:
    import torch

    from automodel.distributed import destroy_global_state, initialize_distributed
    from automodel.launch.worker import exit_process

    initialize_distributed("auto")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    for _ in range(5):
        model(torch.randn(8, 64)).sum().backward()
    destroy_global_state()
    exit_process(0)


if __name__ == "__main__":
    main()
