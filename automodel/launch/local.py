"""Start the workers of a run on this machine, through torch's elastic agent."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveInt

from automodel.launch.continuation import noted_continuation
from automodel.launch.run_id import default_run_id
from automodel.launch.threads import thread_variables
from automodel.launch.worker import LAUNCHER_PID, STATUS_DIR, first_failure
from automodel.processes import signal_handler
from automodel.types import ExitStatus

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""Signals that the agent forwards to the workers: the usual ones, and the one that schedulers send ahead of a time
limit. SIGINT is forwarded by our own handler, which treats the second one differently."""

_SAVING_SECONDS = "600"
"""How long the ranks may take to save after a signal; the agent's own 30 are too few for a large model."""


@dataclass(frozen=True)
class LocalLaunch:
    """The options of ``launch=local``."""

    nproc_per_node: PositiveInt = 1
    max_restarts: NonNegativeInt = 0

    def run(self, module: str, argv: list[str]) -> int:
        """Run ``python -m module *argv`` in every worker and return the status of the whole run.

        The most significant status that a worker wrote counts: bad input, then stopped, then done. A worker
        that failed makes it 1 after the restarts are used up.
        """
        import torch.distributed.launcher.api as agent
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        _quieten_agent()
        run_id = default_run_id()
        with tempfile.TemporaryDirectory(prefix="automodel-") as name, _environment(self._variables(name, run_id)):
            folder = Path(name)
            try:
                with _interruptible(folder):
                    agent.elastic_launch(self._agent_config(folder, run_id), sys.executable)("-m", module, *argv)
                status = _status_of(folder, if_none=ExitStatus.DONE)
            except ChildFailedError as error:
                _report_first_failure(folder, error)
                status = ExitStatus.FAILED
            except SignalException as error:
                _report(f"stopped by {error.sigval.name}")
                status = _status_of(folder, if_none=ExitStatus.FAILED)
            command = noted_continuation(folder)
            if command is not None and status in (ExitStatus.STOPPED, ExitStatus.FAILED):
                print(command, file=sys.stderr, flush=True)
            return status

    def _variables(self, folder: str, run_id: str) -> dict[str, str]:
        threads = thread_variables(os.environ, num_ranks=self.nproc_per_node)
        saving = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SAVING_SECONDS)}
        return threads | saving | {STATUS_DIR: folder, LAUNCHER_PID: str(os.getpid()), "AUTOMODEL_RUN_ID": run_id}

    def _agent_config(self, folder: Path, run_id: str) -> LaunchConfig:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig

        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.nproc_per_node,
            run_id=run_id,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=self.max_restarts,
            # A folder of the agent's own choice would stay in the system's temporary one.
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "agent")),
            signals_to_handle=",".join(signum.name for signum in FORWARDED),
        )


def _status_of(folder: Path, *, if_none: ExitStatus) -> int:
    written = {int(path.read_text()) for path in folder.glob("rank-*")}
    ordered = (ExitStatus.BAD_INPUT, ExitStatus.STOPPED, ExitStatus.DONE)
    return next((status for status in ordered if status in written), if_none)


def _report_first_failure(folder: Path, error: ChildFailedError) -> None:
    """Say which rank failed first; a rank's own report comes last on the screen."""
    rank, failure = error.get_first_failure()
    own_report = first_failure(folder)
    if failure.exitcode < 0:
        _report(f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}; the run is ended")
    elif own_report is None:
        _report(f"rank {rank} failed with status {failure.exitcode}; the run is ended")
    if own_report is not None:
        _report(f"the run is ended; in the words of rank {own_report[0]}:")
        print(own_report[1].rstrip(), file=sys.stderr, flush=True)


def _report(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """Forward the first Ctrl-C to the workers, end at once on the second, and restore the caller's handlers.

    The agent alone would treat the second one like the first, and wait for the workers again.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    received: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        if received:
            _report("interrupted again: ended at once, what was not saved yet is lost")
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(ExitStatus.FAILED)  # the workers die with this process
        received.append(signum)
        raise SignalException("interrupted", sigval=signal.Signals(signum))

    with signal_handler(handle, signal.SIGINT, *FORWARDED):  # the agent replaces those of FORWARDED by its own
        yield


def _quieten_agent() -> None:
    """Keep the agent's log lines off the screen; some of its loggers have their own level."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic.")]
    for name in ["torch.distributed.elastic", *names]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
