"""Check what ``launch=slurm`` writes into a batch script: a mistake there would show only once the job has started."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHIPPED_TEMPLATES = {"srun": "srun.sh.j2", "torchrun": "torchrun.sh.j2"}
_IN_COMMENTS = ("mem", "time", "job_name", "account", "partition", "qos", "constraint")
"""Keys that become ``#SBATCH`` lines, which sbatch splits by rules of its own."""
_TIME = re.compile(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){1,2}|UNLIMITED", re.IGNORECASE)
_EARLIER_SECONDS = 60
"""How far ahead of its time ``--signal`` may come, according to sbatch's manual."""


def script_problems(launch: dict[str, Any]) -> Iterator[str]:
    """Yield what sbatch, or the shell of the batch script, could not read as it is meant, a line each."""
    for key in _IN_COMMENTS:
        value = launch.get(key)
        if isinstance(value, str) and (not value.isprintable() or not value or set(value) & set("\"'\\#")):
            yield f"launch.{key}={value!r}: sbatch reads it from a comment: no line breaks, quotes, backslashes or #"
    yield from _time_problems(launch.get("time"), launch.get("signal_seconds"))
    for line in launch.get("directives", ()):
        if not line.startswith("-") or not line.isprintable():
            yield f"launch.directives: {line!r} must be one option of sbatch, such as --exclusive"
    for module in launch.get("modules", ()):
        if not module or not module.isprintable():
            yield f"launch.modules: {module!r} is not the name of a module"
    template = launch.get("template", "srun")
    if template not in SHIPPED_TEMPLATES and not Path(template).expanduser().is_file():
        yield f"launch.template={template} is neither a file nor one of: {', '.join(SHIPPED_TEMPLATES)}"
    mounts = launch.get("container_mounts", ())
    for mount in mounts:
        if ":" not in mount or "," in mount:
            yield f"launch.container_mounts: {mount!r} must be FROM:TO, without commas"
    if mounts and launch.get("container") is None:
        yield "launch.container_mounts is set without launch.container"


def _time_problems(time: Any, signal_seconds: int | None) -> Iterator[str]:
    if time is None:
        return
    if not _TIME.fullmatch(str(time)):
        yield f"launch.time={time} must be hours:minutes:seconds or days-hours; in a file put it in quotes: '4:00:00'"
    elif signal_seconds is not None and 0 < _seconds(str(time)) < signal_seconds + _EARLIER_SECONDS:
        yield (
            f"launch.time={time} is too short for launch.signal_seconds={signal_seconds}: SLURM may signal "
            f"{_EARLIER_SECONDS} s earlier still, so the run would be stopped while it starts, again and again; "
            "give more time, or fewer seconds (null: no signal)"
        )


def _seconds(time: str) -> int:
    """Return SLURM's notation of a time limit in seconds; 0: none."""
    days, has_days, rest = time.rpartition("-")
    if rest.upper() == "UNLIMITED":
        return 0
    parts = [int(part) for part in rest.split(":")]
    if not has_days and len(parts) == 2:
        parts = [0, *parts]  # without days, two numbers are minutes and seconds
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((24 * int(days or 0) + hours) * 60 + minutes) * 60 + seconds
