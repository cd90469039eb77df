"""The id of a run: the same on all its ranks, and after a requeue or restart."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from datetime import datetime


def default_run_id(env: Mapping[str, str] = os.environ) -> str:
    """Return the launcher's id, else SLURM's (with the array index), else torchrun's, else time and a random tail."""
    if env.get("AUTOMODEL_RUN_ID"):
        return env["AUTOMODEL_RUN_ID"]
    if env.get("SLURM_ARRAY_JOB_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '0')}"
    if env.get("SLURM_JOB_ID"):
        return env["SLURM_JOB_ID"]
    if env.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return env["TORCHELASTIC_RUN_ID"]
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
