"""What is handed to a cluster: the command line of the ranks, and a run directory that is fixed beforehand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from automodel.config import Config, without_launch
from automodel.launch.run_id import default_run_id
from automodel.launch.worker import is_worker
from automodel.secrets import masked_text
from automodel.types import UserError


@dataclass(frozen=True)
class Submission:
    """One run for a cluster. ``argv`` is what follows ``python -m automodel.run`` on every rank."""

    recipe: str
    run_id: str
    run_dir: Path
    argv: list[str]


class ClusterLaunch(Protocol):
    """What a section ``launch`` for a cluster configures."""

    def submit(self, submission: Submission) -> None:
        """Submit the run, or with ``dry_run`` print what would be submitted.

        Raises:
            UserError: it cannot be submitted.
        """
        ...


def submission_of(cfg: Config, argv: list[str], *, env: Mapping[str, str] = os.environ) -> Submission:
    """Return the run of ``cfg``, which the command line ``argv`` made.

    The run directory is chosen here, so a requeued job resumes in it.

    Raises:
        UserError: the command line holds a secret, which a script or manifest would show.
    """
    run_id = default_run_id(outside_of_jobs(env))
    inner = without_launch(argv)
    output_dir = cfg.output_dir
    if output_dir is None:
        output_dir = f"outputs/{cfg.recipe.name}/{run_id}"
        inner = [*inner, f"output_dir={output_dir}"]
    problems = [
        f"{masked_text(argument)} looks like a secret, and would be written into what the cluster gets: export it in a "
        "variable of your own (on Kubernetes name its Secret in launch.secrets), and write KEY='${oc.env:NAME}'"
        for argument in inner
        if masked_text(argument) != argument
    ]
    if problems:
        raise UserError(*problems)
    return Submission(cfg.recipe.name, run_id, Path(output_dir), inner)


def outside_of_jobs(env: Mapping[str, str]) -> dict[str, str]:
    """Return ``env`` without what a surrounding SLURM job says of itself; where the cluster is stays known."""
    kept = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")
    return {key: value for key, value in env.items() if key in kept or not key.startswith(("SLURM_", "SLURMD_"))}


def forget_interactive_step(argv: list[str]) -> None:
    """Submit from a shell of ``srun --pty`` as from any other, instead of taking this process for a rank.

    Changes ``os.environ`` where ``argv`` chooses a launcher: the command line of a rank never does.
    """
    has_one_task = "RANK" not in os.environ and os.environ.get("SLURM_NTASKS", "1") == "1"
    chooses = any(argument.startswith("launch=") and argument != "launch=local" for argument in argv)
    if chooses and has_one_task and is_worker(os.environ):
        outside = outside_of_jobs(os.environ)
        os.environ.clear()
        os.environ.update(outside)
