"""The life of one rank of a run: it starts, carries out its recipe, and ends with a status that says how."""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.config import Config
from automodel.launch.continuation import continuation, has_checkpoint, note_continuation
from automodel.launch.run_id import default_run_id
from automodel.launch.worker import LAUNCHER_PID, report_failure
from automodel.logs import get_logger, setup_logging
from automodel.screen import clear_screen_lines, show_phase
from automodel.secrets import masked_text
from automodel.types import ExitStatus, RunError, UserError

if TYPE_CHECKING:
    from automodel.distributed.runtime.dist_info import DistInfo
    from automodel.distributed.runtime.watchdog import Failure, Watchdog
    from automodel.runs.run_folder import RunDir

log = get_logger("automodel.run")


def run_rank(cfg: Config, argv: list[str], *, is_dry: bool = False) -> ExitStatus:
    """Run the recipe of ``cfg`` in this process, as one rank of its job, and return how it ended.

    Args:
        is_dry: build everything up to the first step and print the plan; nothing is written.
    """
    setup_logging(int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))))
    show_phase(f"{cfg.recipe.name}: loading torch")
    # The stacks in C++ of a peer that lost a connection would bury the words of the rank that failed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from automodel.distributed.runtime.dist_info import destroy_global_state, initialize_distributed
    from automodel.distributed.runtime.flight_recorder import record_collectives
    from automodel.train.rng import make_deterministic
    from automodel.train.signals import serve_one_run

    serve_one_run()
    record_collectives()
    if cfg.rng.deterministic:
        make_deterministic()
    try:
        info = initialize_distributed(cfg.dist_env.backend, timeout_minutes=cfg.dist_env.init_timeout_minutes)
    except UserError as error:
        report_problems(error, is_shared=False)
        return ExitStatus.BAD_INPUT
    except RunError as error:
        report_failure(f"error: {error}")
        return ExitStatus.FAILED
    status = _run_with_peers(cfg, argv, info, is_dry=is_dry)
    if status in (ExitStatus.DONE, ExitStatus.STOPPED):
        # After a failure a peer may be gone, and leaving the group together could wait for it.
        destroy_global_state()
    return status


def _run_with_peers(cfg: Config, argv: list[str], info: DistInfo, *, is_dry: bool) -> ExitStatus:
    from automodel.distributed.runtime.watchdog import start_watchdog

    run_dir = None

    def note_failure(failure: Failure) -> None:
        if run_dir is not None and info.is_main:
            ended = {"status": "failed", "error": f"rank {failure.rank}: {failure.error}"}
            _close_run_dir(run_dir, ExitStatus.FAILED, ended)

    watchdog = start_watchdog(info, cfg.dist_env.init_timeout_minutes, report=report_failure, before_exit=note_failure)
    try:
        if is_dry:
            _carry_out(cfg, info, None)
        else:
            run_dir, run_id = _open_run_dir(cfg, info)
            if info.is_main:
                note_continuation(continuation(argv, run_dir.path), run_dir.checkpoints_dir)
            if watchdog is not None:
                watchdog.record_folder = run_dir.flight_recorder_dir
            _carry_out(cfg, info, (run_dir, run_id))
        status, ended = ExitStatus.DONE, {"status": "done"}
    except BaseException as error:
        status, ended = _how_it_failed(error, watchdog)
    if run_dir is not None and info.is_main:
        _close_run_dir(run_dir, status, ended)
        ended_early = status in (ExitStatus.STOPPED, ExitStatus.FAILED)
        if ended_early and LAUNCHER_PID not in os.environ and has_checkpoint(run_dir.checkpoints_dir):
            print(continuation(argv, run_dir.path), file=sys.stderr, flush=True)
    if watchdog is not None:
        watchdog.finish()
    return status


def _carry_out(cfg: Config, info: DistInfo, run: tuple[RunDir, str] | None) -> None:
    """Train in the run folder, or without one only build."""
    from automodel.runner.job import Job  # brings in transformers, so only once the lock is ours
    from automodel.runner.recipe import build_recipe
    from automodel.runner.train import Run, dry_build, train

    recipe, job = build_recipe(cfg), Job(cfg, info)
    if run is None:
        dry_build(job, recipe)
    else:
        train(job, recipe, Run(*run))


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
    except OSError as error:  # a full disk, for example; the cause of the failure is reported already
        print(f"error: run.json could not be brought up to date: {error}", file=sys.stderr)
    run_dir.release()


def _how_it_failed(error: BaseException, watchdog: Watchdog | None) -> tuple[ExitStatus, dict[str, Any]]:
    from automodel.distributed.runtime.dist_info import get_rank_safe

    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # from the launcher, because a peer failed; this process ends soon anyway
    from automodel.train.loop import RunStopped

    if isinstance(error, UserError):
        report_problems(error)
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
    report_failure(_describe(error))
    return ExitStatus.FAILED, {"status": "failed", "error": what}


def _describe(error: BaseException) -> str:
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


def report_problems(error: UserError, *, is_shared: bool = True) -> None:
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
