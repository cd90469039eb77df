"""``python -m automodel.run``: check the configuration, then run its recipe here or in workers."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.config import (
    Config,
    has_help,
    help_text,
    hydra_command_line,
    hydra_flags,
    load_command_line,
    sweep_jobs,
)
from automodel.launch.continuation import continuation, has_checkpoint, note_continuation
from automodel.launch.local import LocalLaunch
from automodel.launch.run_id import default_run_id
from automodel.launch.submission import forget_interactive_step, submission_of
from automodel.launch.sweep import run_sweep
from automodel.launch.worker import LAUNCHER_PID, die_with_launcher, is_worker, leave, tell_failure
from automodel.logs import get_logger, setup_logging
from automodel.screen import clear_screen_lines, show_phase
from automodel.secrets import masked_text
from automodel.types import ExitStatus, RunError, UserError

if TYPE_CHECKING:
    from automodel.distributed.runtime.dist_info import DistInfo
    from automodel.distributed.runtime.watchdog import Failure, Watchdog
    from automodel.launch.submission import ClusterLaunch
    from automodel.runs.run_folder import RunDir

log = get_logger("automodel.run")  # not __name__, which is __main__ under python -m


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (default: this process's) and leave the process with the run's status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if has_help(argv):
        print(help_text(argv))
        return
    die_with_launcher()
    forget_interactive_step(argv)
    try:
        cfg, argv = load_command_line(argv)
        jobs = sweep_jobs(argv)
    except UserError as error:
        _tell(error, is_shared=False)
        leave(ExitStatus.BAD_INPUT)
    if hydra_flags(argv):
        _show_by_hydra(argv)
        return
    if not is_worker(os.environ):
        setup_logging(rank=0)
    if jobs is not None:
        sys.exit(run_sweep(jobs))
    elif is_worker(os.environ):
        leave(run_recipe(cfg, argv))
    else:
        launch = _launch_of(cfg)
        if not isinstance(launch, LocalLaunch):
            sys.exit(_submit(launch, cfg, argv))
        if launch.nproc_per_node == 1 and not launch.max_restarts:
            leave(run_recipe(cfg, argv))
        log.info("%s: starting %d processes", cfg.recipe.name, launch.nproc_per_node)
        sys.exit(launch.run("automodel.run", argv))


def run_recipe(cfg: Config, argv: list[str]) -> ExitStatus:
    """Run the recipe of ``cfg`` in this process, as one rank of its job, and return how it ended."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    setup_logging(rank)
    show_phase(f"{cfg.recipe.name}: loading torch")
    # The stacks in C++ of a peer that lost a connection would bury the words of the rank that failed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from automodel.distributed.runtime.dist_info import destroy_global_state, initialize_distributed
    from automodel.distributed.runtime.flight_recorder import record_collectives
    from automodel.distributed.runtime.watchdog import start_watchdog
    from automodel.train.rng import make_deterministic
    from automodel.train.signals import serve_one_run

    serve_one_run()
    record_collectives()
    if cfg.rng.deterministic:
        make_deterministic()
    try:
        info = initialize_distributed(cfg.dist_env.backend, timeout_minutes=cfg.dist_env.init_timeout_minutes)
    except UserError as error:
        _tell(error, is_shared=False)
        return ExitStatus.BAD_INPUT
    except RunError as error:
        tell_failure(f"error: {error}")
        return ExitStatus.FAILED
    run_dir = None

    def note_failure(failure: Failure) -> None:
        if run_dir is not None and info.is_main:
            ended = {"status": "failed", "error": f"rank {failure.rank}: {failure.error}"}
            _close_run_dir(run_dir, ExitStatus.FAILED, ended)

    watchdog = start_watchdog(info, cfg.dist_env.init_timeout_minutes, tell=tell_failure, before_exit=note_failure)
    try:
        run_dir, run_id = _open_run_dir(cfg, info)
        if info.is_main:
            note_continuation(continuation(argv, run_dir.path), run_dir.checkpoints_dir)
        if watchdog is not None:
            watchdog.record_folder = run_dir.flight_recorder_dir
        from automodel.runner.job import Job  # brings in transformers, so only once the lock is ours

        _recipe_function(cfg)(Job(cfg, info, run_dir, run_id))
        status, ended = ExitStatus.DONE, {"status": "done"}
    except BaseException as error:
        status, ended = _how_it_failed(error, watchdog)
    if run_dir is not None and info.is_main:
        _close_run_dir(run_dir, status, ended)
        ended_early = status in (ExitStatus.STOPPED, ExitStatus.FAILED)
        if ended_early and LAUNCHER_PID not in os.environ and has_checkpoint(run_dir.checkpoints_dir):
            print(continuation(argv, run_dir.path), file=sys.stderr, flush=True)
    if watchdog is not None:
        watchdog.leave()
    if status in (ExitStatus.DONE, ExitStatus.STOPPED):
        # After a failure a peer may be gone, and leaving the group together could wait for it.
        destroy_global_state()
    return status


def _open_run_dir(cfg: Config, info: DistInfo) -> tuple[RunDir, str]:
    """Lock the run directory on rank 0, and tell every rank its path and the run id."""
    from automodel.distributed.runtime.agreement import run_on_main
    from automodel.runs.run_folder import RunDir
    from automodel.runs.run_lock import WAIT_SEC

    opened: list[RunDir] = []

    def open_it() -> tuple[Path, str]:
        run_id = default_run_id()
        path = Path(cfg.output_dir) if cfg.output_dir else Path("outputs") / cfg.recipe.name / run_id
        # No longer than the other ranks wait for this one.
        opened.append(RunDir.open(path, wait_sec=min(WAIT_SEC, 30 * cfg.dist_env.init_timeout_minutes)))
        return path, opened[0].recorded_run_id() or run_id

    path, run_id = run_on_main(open_it)
    return (opened[0] if opened else RunDir(path)), run_id


def _close_run_dir(run_dir: RunDir, status: ExitStatus, ended: dict[str, Any]) -> None:
    if status == ExitStatus.BAD_INPUT or not run_dir.run_json_path.exists():
        run_dir.abandon()
        return
    try:
        run_dir.update_record(ended=ended | {"time": datetime.now(UTC).isoformat()})
    except OSError as error:  # a full disk, say: what ended the run has been told already
        print(f"error: run.json could not be brought up to date: {error}", file=sys.stderr)
    run_dir.release()


def _recipe_function(cfg: Config) -> Any:
    return _resolve(cfg.recipe.target)


def _launch_of(cfg: Config) -> LocalLaunch | ClusterLaunch:
    return _resolve(cfg.launch["_target_"])(**{key: value for key, value in cfg.launch.items() if key != "_target_"})


def _submit(launch: ClusterLaunch, cfg: Config, argv: list[str]) -> ExitStatus:
    try:
        launch.submit(submission_of(cfg, argv))
    except UserError as error:
        _tell(error)
        return ExitStatus.BAD_INPUT
    return ExitStatus.DONE


def _resolve(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    return getattr(import_module(module_name), name)


def _how_it_failed(error: BaseException, watchdog: Watchdog | None) -> tuple[ExitStatus, dict[str, Any]]:
    from automodel.distributed.runtime.dist_info import get_rank_safe

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, on account of a peer: it has its way soon
    from automodel.train.loop import RunStopped

    if isinstance(error, UserError):
        _tell(error)
        return ExitStatus.BAD_INPUT, {}
    if isinstance(error, RunStopped):
        log.info("%s%s", error, "" if error.is_saved else "; checkpoint.enabled=false, so nothing was saved")
        status = ExitStatus.STOPPED if error.is_saved else ExitStatus.FAILED
        return status, {"status": "stopped", "step": error.step}
    first = watchdog.failure() if watchdog is not None else None
    if _is_echo(error) or first is not None:
        # A peer failed first: its words are the ones to read, so let them come, and do not bury them.
        time.sleep(2)
        first = watchdog.failure() if watchdog is not None else None
        what = f"rank {first.rank}: {first.error}" if first else "a peer was lost"
        if first is None:
            print(f"rank {get_rank_safe()} lost a peer: {masked_text(str(error)).splitlines()[0]}", file=sys.stderr)
        return ExitStatus.FAILED, {"status": "failed", "error": what}
    what = f"{type(error).__name__}: {error}"
    if watchdog is not None:
        watchdog.fail(what)
    _record_for_agent(error)
    tell_failure(_in_words(error))
    return ExitStatus.FAILED, {"status": "failed", "error": what}


def _in_words(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"error: {error}" if isinstance(error, RunError) else "".join(traceback.format_exception(error))


def _is_echo(error: BaseException) -> bool:
    """Return whether ``error`` only says that a peer has failed or gone."""
    import torch.distributed as dist

    from automodel.distributed.runtime.agreement import PeerError

    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
    return isinstance(error, (dist.DistError, PeerError)) or any(words in str(error) for words in gone)


def _record_for_agent(error: BaseException) -> None:
    """Leave the traceback where torchrun's agent looks for it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _tell(error: UserError, *, is_shared: bool = True) -> None:
    """Print the problems once for the whole job: rank 0 speaks, the others give it the time to.

    Before the ranks have met, a problem may be that of a single node: there one rank of each node speaks.
    """
    clear_screen_lines()
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if rank != "0":
        time.sleep(2)
    if rank == "0" or (not is_shared and local_rank == "0"):
        where = "" if rank == "0" else f" on {platform.node()}"
        for problem in error.problems:
            print(f"error{where}: {masked_text(problem)}", file=sys.stderr, flush=True)


def _show_by_hydra(argv: list[str]) -> None:
    """Let Hydra print what is asked for (``--cfg``, ``--info``, ...); nothing runs."""
    import hydra

    @hydra.main(config_path="pkg://automodel.conf", config_name="config", version_base="1.3")
    def show_nothing_else(cfg: Any) -> None:
        pass

    sys.argv = [sys.argv[0], *hydra_command_line(argv)]
    show_nothing_else()


if __name__ == "__main__":
    main()
