"""The id of a run: the same on all its ranks, and after a requeue or restart."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from datetime import datetime

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""SLURM numbers the steps of batch scripts and of salloc's shells from here on (slurm.h)."""


def default_run_id(env: Mapping[str, str] = os.environ) -> str:
    """Return the launcher's id, else that of the SLURM step, else torchrun's, else time and a random tail.

    A SLURM allocation may hold any number of runs, one after another: its id counts only in a step whose tasks are
    the ranks, and with the step's number after the first. Our own batch script sets AUTOMODEL_RUN_ID.
    """
    if env.get("AUTOMODEL_RUN_ID"):
        return env["AUTOMODEL_RUN_ID"]
    if _is_rank_of_step(env):
        job = env["SLURM_JOB_ID"]
        if env.get("SLURM_ARRAY_JOB_ID"):
            job = f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '0')}"
        return job if env["SLURM_STEP_ID"] == "0" else f"{job}.{env['SLURM_STEP_ID']}"
    if env.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return env["TORCHELASTIC_RUN_ID"]
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _is_rank_of_step(env: Mapping[str, str]) -> bool:
    """Return whether srun started this process as a rank, and not a shell or a launcher in which it was started."""
    is_task = all(env.get(name, "").isdecimal() for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID"))
    if not is_task or "RANK" in env:
        return False
    return "SLURM_PTY_PORT" not in env and int(env["SLURM_STEP_ID"]) < _FIRST_SPECIAL_STEP
