"""The run directory: its lock, the record of its run, and the paths in it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from automodel import __version__
from automodel.runs.run_lock import WAIT_SEC, RunLock
from automodel.secrets import masked, masked_text
from automodel.types import UserError


class RunDir:
    """Paths of a run directory; ``open`` also locks it for this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints_dir = path / "checkpoints"
        self.model_dir = path / "model"
        self.tokenizer_dir = path / "tokenizer"
        self.log_path = path / "train.log"
        self.flight_recorder_dir = path / "flight_recorder"
        self.config_path = path / "config.yaml"
        self.run_json_path = path / "run.json"
        self._lock_path = path / ".lock"
        self._lock: RunLock | None = None
        self._made: list[Path] = []

    @classmethod
    def open(cls, path: Path, *, wait_sec: float = WAIT_SEC) -> RunDir:
        """Create the folder and lock it until this process ends.

        If the holder of the lock may have died with its node, wait up to ``wait_sec`` for the lock.

        Raises:
            UserError: another process holds it, or it cannot be created.
        """
        run_dir = cls(path)
        try:
            run_dir._made = _make_folders(path)
            run_dir._lock = RunLock(run_dir._lock_path, wait_sec=wait_sec)
        except OSError as error:
            raise UserError(f"output_dir={path} cannot be written: {error}") from error
        return run_dir

    def holds_run(self) -> bool:
        """Return whether the folder holds a run, finished or not."""
        return self.run_json_path.exists() or self.metrics_path.exists() or self.checkpoints_dir.exists()

    def recorded_run_id(self) -> str | None:
        """Return the id of the run in this folder, which it keeps when it is restarted by hand."""
        return self._record().get("run_id")

    def abandon(self) -> None:
        """Release the lock and, if the folder holds no run, remove the folders that ``open`` created."""
        if not self.holds_run():
            self._lock_path.unlink(missing_ok=True)
            if self._made:
                shutil.rmtree(self.path, ignore_errors=True)
            for folder in self._made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        self.release()

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def write_config(self, text: str) -> None:
        """Write the resolved configuration."""
        write_whole(self.config_path, text)

    def start_record(self, *, resumed_from_step: int | None, **facts: Any) -> None:
        """Write ``run.json`` for this start; ``resumed_from_step`` is appended to those of earlier starts."""
        starts = self._record().get("resumed_from_step", [])
        record = facts | {"resumed_from_step": [*starts, resumed_from_step], "ended": None}
        write_whole(self.run_json_path, json.dumps(masked(record), indent=2) + "\n")

    def update_record(self, **facts: Any) -> None:
        """Change entries of ``run.json``."""
        write_whole(self.run_json_path, json.dumps(self._record() | masked(facts), indent=2) + "\n")

    def metrics_size(self) -> int:
        """Return the length in bytes of the metrics file; 0 if there is none."""
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def cut_metrics(self, num_bytes: int) -> None:
        """Cut the metrics file back to its first ``num_bytes`` bytes."""
        if self.metrics_path.exists():
            os.truncate(self.metrics_path, min(num_bytes, self.metrics_size()))

    def _record(self) -> dict[str, Any]:
        try:
            return json.loads(self.run_json_path.read_text())
        except (FileNotFoundError, ValueError):
            return {}


def environment_record() -> dict[str, Any]:
    """Return the environment of this run: command, versions, git commit of the working folder, host."""
    names = ("torch", "transformers", "datasets", "hydra-core", "numpy")
    versions = {"automodel": __version__, "python": platform.python_version()} | {
        name: _version(name) for name in names
    }
    return {
        "command": masked_text(shlex.join([sys.executable, *sys.orig_argv[1:]])),
        "versions": versions,
        "git_commit": _git_commit(),
        "host": platform.node(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _make_folders(path: Path) -> list[Path]:
    """Create ``path`` and return the created folders, deepest first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old text or the new, never a part of it."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
