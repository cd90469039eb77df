"""Render a SLURM batch script, and hand it to sbatch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from pydantic import PositiveInt

from automodel.environment import FIRST_PORT, NUM_PORTS
from automodel.launch.job_checks import job_problems
from automodel.launch.slurm_checks import SHIPPED_TEMPLATES, script_problems
from automodel.launch.submission import Submission, outside_of_jobs
from automodel.types import UserError

if TYPE_CHECKING:
    from automodel.config import Config

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class SlurmLaunch:
    """What ``launch=slurm`` configures; the defaults are in ``conf/launch/slurm.yaml``."""

    dry_run: bool
    template: str
    nodes: PositiveInt
    nproc_per_node: PositiveInt
    gpus_per_node: PositiveInt | None
    cpus_per_task: PositiveInt | None
    mem: str | None
    time: str | None
    job_name: str | None
    account: str | None
    partition: str | None
    qos: str | None
    constraint: str | None
    directives: list[str]
    environment: dict[str, str | int | float]
    modules: list[str]
    setup: list[str]
    python: str | None
    container: str | None
    container_mounts: list[str]
    signal_seconds: PositiveInt | None

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together, or into a batch script; see ``config/targets.py``."""
        yield from job_problems(section)
        yield from script_problems(section)

    def submit(self, submission: Submission) -> None:
        """Submit the run with sbatch and print how to follow it; with ``dry_run`` print the script alone.

        Raises:
            UserError: the template fails, sbatch is missing, or it refuses the job.
        """
        script = self.script(submission)
        if self.dry_run:
            print(script, end="")
            return
        if shutil.which("sbatch") is None:
            raise UserError(
                "launch=slurm: there is no sbatch on this machine; submit from a login node of the cluster, or see "
                "the script with launch.dry_run=true"
            )
        folder = submission.run_dir / "slurm"
        job_id = _submit_script(script, folder)
        log = folder / f"{job_id}.log"
        print(
            f"submitted job {job_id}, its script is {folder / 'job.sh'}\n"
            f"  state                  squeue --jobs {job_id}\n"
            f"  log                    tail -F {shlex.quote(str(log))}\n"
            f"  save and be requeued   scancel --batch --signal=USR1 {job_id}\n"
            f"  end                    scancel {job_id}"
        )

    def script(self, submission: Submission, *, workdir: Path | None = None) -> str:
        """Return the batch script; ``workdir`` is where the ranks run, by default the current folder.

        Raises:
            UserError: the template cannot be read or rendered.
        """
        name = SHIPPED_TEMPLATES.get(self.template)
        own = Path(self.template).expanduser()
        folders = [_TEMPLATES] if name else [own.parent, _TEMPLATES]
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folders),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters["quote"] = lambda value: shlex.quote(str(value))
        workdir = workdir or Path.cwd()
        try:
            script = environment.get_template(name or own.name).render(
                vars(self)
                | {
                    "sbatch_options": list(self._sbatch_options(submission)),
                    "srun_options": list(self._srun_options(submission, workdir)),
                    "python": self.python or (sys.executable if self.container is None else "python"),
                    "argv": submission.argv,
                    "recipe": submission.recipe,
                    "run_id": submission.run_id,
                    "run_dir": workdir / submission.run_dir,
                    "workdir": workdir,
                    "first_port": FIRST_PORT,
                    "num_ports": NUM_PORTS,
                }
            )
        except (jinja2.TemplateError, OSError, UnicodeError) as error:
            line = f":{error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UserError(f"launch.template={self.template}{line}: {type(error).__name__}: {error}") from None
        if not script.startswith("#!"):
            raise UserError(f"launch.template={self.template}: a batch script begins with #!/bin/bash, sbatch insists")
        return script

    def _sbatch_options(self, submission: Submission) -> Iterator[str]:
        tasks = 1 if self.template == "torchrun" else self.nproc_per_node
        cpus = self._cpus_of_a_task()
        named = {
            "job-name": self.job_name or f"automodel-{submission.recipe}",
            "nodes": self.nodes,
            "ntasks-per-node": tasks,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": cpus,
            "mem": self.mem,
            "time": self.time,
            "account": self.account,
            "partition": self.partition,
            "qos": self.qos,
            "constraint": self.constraint,
            "output": "%j.log",
            "open-mode": "append",
            "signal": self.signal_seconds and f"B:USR1@{self.signal_seconds}",
        }
        for option, value in named.items():
            if value is not None:
                yield f'--{option}="{value}"' if " " in str(value) else f"--{option}={value}"
        yield "--requeue"
        yield from self.directives

    def _srun_options(self, submission: Submission, workdir: Path) -> Iterator[str]:
        # A rank that is done must not cost the others their end, such as rank 0's logger; a rank that never came does.
        yield from ("--kill-on-bad-exit=0", "--wait=300")
        if self.cpus_per_task is not None:  # srun takes it over from sbatch in some versions alone
            yield f"--cpus-per-task={self._cpus_of_a_task()}"
        if self.container is not None:
            run_dir = workdir / submission.run_dir
            folders = [workdir] if run_dir.is_relative_to(workdir) else [workdir, run_dir]
            mounts = [f"{folder}:{folder}" for folder in folders]
            yield f"--container-image={self.container}"
            yield f"--container-mounts={','.join([*mounts, *self.container_mounts])}"
            yield f"--container-workdir={workdir}"

    def _cpus_of_a_task(self) -> int | None:
        if self.cpus_per_task is None or self.template != "torchrun":
            return self.cpus_per_task
        return self.cpus_per_task * self.nproc_per_node


def _submit_script(script: str, folder: Path) -> str:
    """Write ``script`` and submit it from ``folder``, where SLURM then puts the log; return the job's id."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "job.sh"
        file.unlink(missing_ok=True)
        with open(file, "x", opener=lambda path, flags: os.open(path, flags, 0o700)) as opened:
            opened.write(script)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    done = subprocess.run(
        ["sbatch", "--parsable", file.name],
        cwd=folder,
        env=outside_of_jobs(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        file.unlink()
        for each in made:
            each.rmdir()
        reason = done.stderr.strip() or f"status {done.returncode}"
        raise UserError(f"sbatch refused the job: {reason}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    return done.stdout.strip().split(";")[0]
