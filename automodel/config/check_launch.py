"""Check what ``launch`` writes into a batch script or manifest: there a wrong line is found hours later."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from automodel.config.schema import Config
from automodel.secrets import is_secret_key, masked_text

SLURM_TEMPLATES = ("srun", "torchrun")
_SBATCH_KEYS = ("mem", "time", "job_name", "account", "partition", "qos", "constraint")
_TIME = re.compile(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){1,2}|UNLIMITED", re.IGNORECASE)
_EARLIER_SECONDS = 60
"""So much ahead of its time ``--signal`` may come, by sbatch's manual."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KUBERNETES_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def check_launch(cfg: Config) -> Iterator[str]:
    """Yield what is wrong with ``launch``, a line each; types are checked elsewhere."""
    launch, target = cfg.launch, str(cfg.launch.get("_target_"))
    for key in ("nodes", "gpus_per_node", "cpus_per_task", "cpus_per_node", "signal_seconds"):
        value = launch.get(key)
        if isinstance(value, int) and value < 1:
            yield f"launch.{key}={value} must be at least 1"
    gpus, ranks = launch.get("gpus_per_node"), launch.get("nproc_per_node")
    if isinstance(gpus, int) and isinstance(ranks, int) and 1 <= gpus < ranks:
        yield f"launch.nproc_per_node={ranks} is more than launch.gpus_per_node={gpus}: every rank needs its own GPU"
    if isinstance(launch.get("environment"), dict):
        yield from _check_environment(launch["environment"])
    if target.endswith(".SlurmLaunch"):
        yield from _check_slurm(launch)
    if target.endswith(".KubernetesLaunch"):
        yield from _check_kubernetes(launch)


def _check_environment(variables: dict[str, Any]) -> Iterator[str]:
    for name, value in variables.items():
        key = f"launch.environment.{name}"
        if not _NAME.fullmatch(str(name)):
            yield f"{key}: a variable's name has letters, digits and _ alone, and no digit first"
        elif is_secret_key(str(name)) or masked_text(str(value)) != str(value):
            yield (
                f"{key} looks like a secret, and would be written down: export it in your shell before you submit, as "
                "sbatch hands the environment on; on Kubernetes name its Secret in launch.secrets"
            )
        elif "\0" in str(value):
            yield f"{key}: a variable cannot hold a NUL"


def _check_slurm(launch: dict[str, Any]) -> Iterator[str]:
    for key in _SBATCH_KEYS:
        value = launch.get(key)
        if isinstance(value, str) and (not value.isprintable() or not value or set(value) & set("\"'\\#")):
            yield f"launch.{key}={value!r}: sbatch reads it from a comment: no line breaks, quotes, backslashes or #"
    time = launch.get("time")
    if time is not None and not _TIME.fullmatch(str(time)):
        yield f"launch.time={time} must be hours:minutes:seconds or days-hours; in a file put it in quotes: '4:00:00'"
    elif time is not None and isinstance(launch.get("signal_seconds"), int):
        yield from _check_signal(str(time), launch["signal_seconds"])
    for line in _texts(launch, "directives"):
        if not line.startswith("-") or not line.isprintable():
            yield f"launch.directives: {line!r} must be one option of sbatch, such as --exclusive"
    for module in _texts(launch, "modules"):
        if not module or not module.isprintable():
            yield f"launch.modules: {module!r} is no name of a module"
    template = launch.get("template")
    if isinstance(template, str) and template not in SLURM_TEMPLATES and not Path(template).expanduser().is_file():
        yield f"launch.template={template} is neither a file nor one of: {', '.join(SLURM_TEMPLATES)}"
    for mount in _texts(launch, "container_mounts"):
        if ":" not in mount or "," in mount:
            yield f"launch.container_mounts: {mount!r} must be FROM:TO, without commas"
    if launch.get("container_mounts") and launch.get("container") is None:
        yield "launch.container_mounts is set without launch.container"


def _check_signal(time: str, signal_seconds: int) -> Iterator[str]:
    if 0 < _seconds(time) < signal_seconds + _EARLIER_SECONDS:
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


def _check_kubernetes(launch: dict[str, Any]) -> Iterator[str]:
    if launch.get("dry_run") is False:
        yield "launch=kubernetes prints a manifest and submits nothing: add launch.dry_run=true, and hand what is " \
            "printed to kubectl apply -f -"  # fmt: skip
    names = {"job_name": launch.get("job_name"), "namespace": launch.get("namespace")}
    for key, name in names.items():
        if isinstance(name, str) and not _KUBERNETES_NAME.fullmatch(name):
            yield f"launch.{key}={name} must have lower-case letters, digits and - alone, 63 at most"
    for name in [*_texts(launch, "secrets"), *(launch.get("volumes") or {})]:
        if not _KUBERNETES_NAME.fullmatch(str(name)):
            yield f"launch: {name!r} is no name of a Secret or a PersistentVolumeClaim"


def _texts(launch: dict[str, Any], key: str) -> list[str]:
    values = launch.get(key)
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
