"""Check what every launcher of a cluster has: its numbers of GPUs and ranks, and the variables that it exports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from automodel.secrets import is_secret_key, masked_text

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def job_problems(launch: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with ``launch.gpus_per_node`` and ``launch.environment``, a line each."""
    gpus, ranks = launch.get("gpus_per_node"), launch.get("nproc_per_node", 1)
    if gpus is not None and gpus < ranks:
        yield f"launch.nproc_per_node={ranks} is more than launch.gpus_per_node={gpus}: every rank needs its own GPU"
    for name, value in launch.get("environment", {}).items():
        key = f"launch.environment.{name}"
        if not _NAME.fullmatch(name):
            yield f"{key}: the name of a variable has letters, digits and _ alone, and no digit first"
        elif is_secret_key(name) or masked_text(str(value)) != str(value):
            yield (
                f"{key} looks like a secret, and would be written down: export it in your shell before you submit, as "
                "sbatch hands the environment on; on Kubernetes name its Secret in launch.secrets"
            )
        elif "\0" in str(value):
            yield f"{key}: a variable cannot hold a NUL"
