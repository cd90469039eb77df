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

from automodel.launch.continuation import noted_continuation
from automodel.launch.run_id import default_run_id
from automodel.launch.worker import LAUNCHER_PID, STATUS_DIR, first_failure
from automodel.types import ExitStatus

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

FORWARDED = "SIGTERM,SIGHUP,SIGQUIT,SIGUSR1"
"""What the agent hands on to the workers: the usual ones, and the one that schedulers send ahead of a time limit.

SIGINT is handed on as well, but by our own handler, which knows the second one.
"""

_SAVING_SECONDS = "600"
"""How long the ranks may take to save after a signal; the agent's own 30 are too few for a large model."""


@dataclass(frozen=True)
class LocalLaunch:
    """What ``launch=local`` configures."""

    nproc_per_node: int = 1
    max_restarts: int = 0

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
        with tempfile.TemporaryDirectory(prefix="automodel-") as name, _environment(self._environment(name, run_id)):
            folder = Path(name)
            try:
                with _interrupts(folder):
                    agent.elastic_launch(self._agent_config(folder, run_id), sys.executable)("-m", module, *argv)
                status = _status_of(folder, if_none=ExitStatus.DONE)
            except ChildFailedError as error:
                _tell_what_failed(folder, error)
                status = ExitStatus.FAILED
            except SignalException as error:
                _tell(f"stopped by {error.sigval.name}")
                status = _status_of(folder, if_none=ExitStatus.FAILED)
            told = noted_continuation(folder)
            if told is not None and status in (ExitStatus.STOPPED, ExitStatus.FAILED):
                print(told, file=sys.stderr, flush=True)
            return status

    def _environment(self, folder: str, run_id: str) -> dict[str, str]:
        return {
            STATUS_DIR: folder,
            LAUNCHER_PID: str(os.getpid()),
            "AUTOMODEL_RUN_ID": run_id,
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SAVING_SECONDS),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self._threads())),
        }

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
            monitor_interval=0.1,
            # A folder of the agent's own choice would stay in the system's temporary one.
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "agent")),
            signals_to_handle=FORWARDED,
        )

    def _threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.nproc_per_node)


def _status_of(folder: Path, *, if_none: ExitStatus) -> int:
    written = {int(path.read_text()) for path in folder.glob("rank-*")}
    for status in (ExitStatus.BAD_INPUT, ExitStatus.STOPPED, ExitStatus.DONE):
        if status in written:
            return status
    return if_none


def _tell_what_failed(folder: Path, error: ChildFailedError) -> None:
    """Say which rank failed first; what a rank had to say of it comes last on the screen."""
    rank, failure = error.get_first_failure()
    told = first_failure(folder)
    if told is None or failure.exitcode < 0:
        _tell(f"rank {rank} {_what_happened(failure)}; the run is ended")
    if told is not None:
        teller, text = told
        _tell(f"the run is ended; in the words of rank {teller}:")
        print(text.rstrip(), file=sys.stderr, flush=True)


def _what_happened(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"failed with status {failure.exitcode}"


def _tell(text: str) -> None:
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
def _interrupts(folder: Path) -> Iterator[None]:
    """Hand the first Ctrl-C on to the workers, end at once on the second, and put the caller's handlers back.

    The agent alone would take the second one for the first, and wait for the workers again.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    noted: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if noted:
            _tell("interrupted again: ended at once, what was not saved yet is lost")
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(ExitStatus.FAILED)  # the workers die with this process
        noted.append(number)
        raise SignalException("interrupted", sigval=signal.SIGINT)

    names = [*FORWARDED.split(","), "SIGINT"]
    handlers = {number: signal.getsignal(number) for number in (signal.Signals[name] for name in names)}
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _quieten_agent() -> None:
    """Keep the agent's log lines off the screen; some of its loggers have a level of their own."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
