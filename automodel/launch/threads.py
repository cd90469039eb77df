"""How many threads a process on the CPU computes with, and how they wait for each other.

Torch's OpenMP library reads both from the environment when it is loaded, so they are chosen before torch is imported.
What the user exported is kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

NUM_THREADS = "OMP_NUM_THREADS"
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SPIN_COUNT = "10000"
"""Rounds that a thread spins for the others before it sleeps. By default it spins for milliseconds: on a machine with
other work the threads then wait for each other on the cores that they block, and training is ten times slower."""


def thread_variables(env: Mapping[str, str], *, num_ranks: int, output_dir: str | None = None) -> dict[str, str]:
    """Return the variables to add to ``env`` for each of ``num_ranks`` processes on this machine.

    Args:
        output_dir: a run that is resumed there keeps its number of threads, because sums by another number of threads
            differ in their last bits.
    """
    chosen: dict[str, str] = {}
    if NUM_THREADS not in env:
        num_threads = _recorded(output_dir) or max(1, (os.cpu_count() or 1) // num_ranks)
        chosen[NUM_THREADS] = str(num_threads)
    if not any(name in env for name in _WAITING):
        chosen["GOMP_SPINCOUNT"] = _SPIN_COUNT
    return chosen


def _recorded(output_dir: str | None) -> int | None:
    """Return the number of threads that the run in ``output_dir`` was started with; None for a new run."""
    if output_dir is None:
        return None
    try:
        value = json.loads((Path(output_dir) / "run.json").read_text())["num_threads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) and value > 0 else None
