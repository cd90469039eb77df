"""Start the workers of a run on this machine, through torch's elastic agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from automodel.launch.run_id import default_run_id
from automodel.launch.worker import LAUNCHER_PID, STATUS_DIR
from automodel.types import ExitStatus

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


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
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        run_id = default_run_id()
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        with (
            tempfile.TemporaryDirectory(prefix="automodel-") as folder,
            _environment(
                {
                    STATUS_DIR: folder,
                    LAUNCHER_PID: str(os.getpid()),
                    "AUTOMODEL_RUN_ID": run_id,
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self._threads())),
                }
            ),
            _second_interrupt_kills(),
        ):
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=self.nproc_per_node,
                run_id=run_id,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=self.max_restarts,
                monitor_interval=0.1,
            )
            try:
                elastic_launch(config, sys.executable)("-m", module, *argv)
            except ChildFailedError as error:
                rank, failure = error.get_first_failure()
                _tell(f"rank {rank} {_what_happened(failure)}; the run is ended")
                return ExitStatus.FAILED
            except (SignalException, KeyboardInterrupt) as error:
                _tell(f"stopped: {error or 'interrupted'}")
                return _status_of(Path(folder), if_none=ExitStatus.FAILED)
            return _status_of(Path(folder), if_none=ExitStatus.DONE)

    def _threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.nproc_per_node)


def _status_of(folder: Path, *, if_none: ExitStatus) -> int:
    written = {int(path.read_text()) for path in folder.iterdir()}
    for status in (ExitStatus.BAD_INPUT, ExitStatus.STOPPED, ExitStatus.DONE):
        if status in written:
            return status
    return if_none


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
def _second_interrupt_kills() -> Iterator[None]:
    """Nothing yet stands between the agent and Ctrl-C; put the caller's handlers back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
