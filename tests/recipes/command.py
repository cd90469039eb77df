"""Start the command line as a user does, and read what a run leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAST = ["evaluation=loss", "validation_dataset.limit=30", "dataset.limit=200", "step_scheduler.log_every_steps=1",
        "step_scheduler.local_batch_size=8"]  # fmt: skip
"""The embedded default without its generated answers and most of its rows."""


def start(*argv: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen:
    """Start a run with its output kept."""
    return subprocess.Popen(
        [sys.executable, "-m", "automodel.run", *argv],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*argv: str, status: int = 0, cwd: Path = ROOT, **env: str) -> str:
    """Run to the end, expect ``status``, and return everything that was printed."""
    process = start(*argv, cwd=cwd, **env)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, f"ended with {process.returncode} instead of {status}:\n{output}"
    return output


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the metric records of one kind."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same whenever the same step is trained again."""
    return {key: record[key] for key in ("step", "epoch", "loss", "grad_norm", "lr", "num_label_tokens", "num_tokens")}
