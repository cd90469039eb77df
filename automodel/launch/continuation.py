"""The last lines of a run that ended early: the command that continues it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from automodel.config.choices import quoted
from automodel.launch.worker import LAUNCHER_PID, STATUS_DIR, is_worker
from automodel.secrets import masked_text

_NOTE = "continuation"


def continuation(argv: list[str], output_dir: Path, *, env: Mapping[str, str] = os.environ) -> str:
    """Return how to start the run of the command line ``argv`` again, so that it continues in ``output_dir``."""
    words = [masked_text(arg) for arg in argv if not arg.startswith("checkpoint.resume=never")]
    if len(words) < len(argv):
        words.append("checkpoint.resume=auto")
    if not any(arg.startswith("output_dir=") for arg in argv):
        folder = str(output_dir)
        words.append(f"output_dir={folder if re.fullmatch('[A-Za-z0-9._/@+-]+', folder) else quoted(folder)}")
    where = ", under the same launcher" if is_worker(env) and LAUNCHER_PID not in env else ""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    return f"to continue{where}:\n  {shlex.join([python, '-m', 'automodel.run', *words])}"


def note_continuation(text: str, checkpoints: Path) -> None:
    """Leave ``text`` for our launcher, which prints it last, even if this process is killed."""
    if folder := os.environ.get(STATUS_DIR):
        (Path(folder) / _NOTE).write_text(f"{checkpoints.absolute()}\n{text}")


def noted_continuation(folder: Path) -> str | None:
    """Return what ``note_continuation`` left in the launcher's ``folder``, if the run has saved a checkpoint."""
    try:
        checkpoints, _, text = (folder / _NOTE).read_text().partition("\n")
    except FileNotFoundError:
        return None
    return text if has_checkpoint(Path(checkpoints)) else None


def has_checkpoint(checkpoints: Path) -> bool:
    """Return whether a run has saved."""
    return (checkpoints / "latest").exists()
