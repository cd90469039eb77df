"""A run that a verb starts, to check its outcome."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from automodel.launch.worker import LAUNCHER_PID
from automodel.types import ExitStatus, RunError, UserError

_NUM_LAST_LINES = 30


class ChildRun:
    """A run of one configuration in processes of its own, which die with this one.

    Args:
        tree: the plain configuration.
        parent: where the run directory ``name`` and what belongs to it are made.

    Attributes:
        folder: the run directory.
    """

    def __init__(self, tree: dict[str, Any], parent: Path, name: str) -> None:
        self.folder, self._parent, self._name = parent / name, parent, name
        self._output = parent / f"{name}.log"
        (parent / f"{name}.yaml").write_text(yaml.safe_dump(tree | {"output_dir": str(self.folder)}))

    def start(self) -> None:
        """Start it, with its output kept out of sight."""
        # No run id or status folder of a launcher's; by its number, the run dies with this process.
        env = {key: value for key, value in os.environ.items() if not key.startswith("AUTOMODEL_")}
        env[LAUNCHER_PID] = str(os.getpid())
        env["TMPDIR"] = str(self._parent)  # for what a killed launcher leaves behind
        command = ["-m", "automodel.run", "--config-path", str(self._parent), "--config-name", self._name]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command], env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                process_group=0,  # a Ctrl-C reaches it through this process alone, and so once
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self, timeout_sec: float | None = None) -> int:
        """Wait until it has ended and return its status; Ctrl-C ends it.

        Raises:
            RunError: it did not end in time.
        """
        try:
            return self._process.wait(timeout_sec)
        except KeyboardInterrupt:
            self._process.terminate()
            self._process.wait()
            raise
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise RunError(f"the {self._name} run did not end within {timeout_sec:.0f} seconds") from None

    def wait_until_done(self) -> None:
        """Wait until it is done.

        Raises:
            UserError: its input is wrong.
            RunError: it ended otherwise.
        """
        status = self.wait()
        lines = self._output.read_text(errors="replace").splitlines()
        problems = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if status == ExitStatus.BAD_INPUT and problems:
            raise UserError(*problems)
        if status:
            raise RunError(self.how_it_ended(status))

    def how_it_ended(self, status: int) -> str:
        """Return a sentence about ``status``, with the last lines of output."""
        last = self._output.read_text(errors="replace").splitlines()[-_NUM_LAST_LINES:]
        return f"the {self._name} run ended with status {status}; its last lines:\n" + "\n".join(f"  {x}" for x in last)
