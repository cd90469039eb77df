"""Start a run: check its configuration, then run the recipe in this process, in workers, or as a batch job."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from automodel.cli.sweep import run_sweep
from automodel.config import Config, hydra_command_line, hydra_flags, load_command_line, sweep_jobs
from automodel.config.arguments import DRY_BUILD
from automodel.config.targets import resolve
from automodel.launch.local import LocalLaunch
from automodel.launch.submission import forget_interactive_step, submission_of
from automodel.launch.threads import thread_variables
from automodel.launch.worker import die_with_launcher, exit_process, is_worker
from automodel.logs import get_logger, setup_logging
from automodel.runner.process import report_problems, run_rank
from automodel.types import ExitStatus, UserError

if TYPE_CHECKING:
    from automodel.launch.submission import ClusterLaunch

log = get_logger("automodel.run")  # not __name__, which is __main__ under python -m


def start(argv: list[str], *, is_dry: bool) -> None:
    """Check the command line, then run its recipe here or in workers, and exit with the run's status."""
    die_with_launcher()
    forget_interactive_step(argv)
    try:
        cfg, argv = load_command_line(argv)
        jobs = sweep_jobs(argv)
        if is_dry and (jobs is not None or not isinstance(_launch_of(cfg), LocalLaunch)):
            raise UserError(f"{DRY_BUILD} builds one configuration on this machine: leave out -m, and use launch=local")
    except UserError as error:
        report_problems(error, is_shared=False)
        exit_process(ExitStatus.BAD_INPUT)
    if hydra_flags(argv):
        _show_by_hydra(argv)
        return
    if not is_worker(os.environ):
        setup_logging(rank=0)
    if jobs is not None:
        sys.exit(run_sweep(jobs))
    elif is_worker(os.environ):
        exit_process(run_rank(cfg, argv, is_dry=is_dry))
    else:
        launch = _launch_of(cfg)
        if not isinstance(launch, LocalLaunch):
            sys.exit(_submit(launch, cfg, argv))
        num_ranks = launch.nproc_per_node
        os.environ.update(thread_variables(os.environ, num_ranks=num_ranks, output_dir=cfg.output_dir))
        if num_ranks == 1 and not launch.max_restarts:
            exit_process(run_rank(cfg, argv, is_dry=is_dry))
        log.info("%s: starting %d processes", cfg.recipe.name, num_ranks)
        sys.exit(launch.run("automodel.run", [*argv, *([DRY_BUILD] if is_dry else [])]))


def _launch_of(cfg: Config) -> LocalLaunch | ClusterLaunch:
    return resolve(cfg.launch["_target_"])(**{key: value for key, value in cfg.launch.items() if key != "_target_"})


def _submit(launch: ClusterLaunch, cfg: Config, argv: list[str]) -> ExitStatus:
    try:
        launch.submit(submission_of(cfg, argv))
    except UserError as error:
        report_problems(error)
        return ExitStatus.BAD_INPUT
    return ExitStatus.DONE


def _show_by_hydra(argv: list[str]) -> None:
    """Let Hydra print what is asked for (``--cfg``, ``--info``, ...); nothing runs."""
    import hydra

    @hydra.main(config_path="pkg://automodel.conf", config_name="config", version_base="1.3")
    def show_nothing_else(cfg: Any) -> None:
        pass

    sys.argv = [sys.argv[0], *hydra_command_line(argv)]
    show_nothing_else()
