"""Pretended nodes for tests of FirstRankPerNode: where a rank runs is what its environment says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

PLACES = ("LOCAL_RANK", "GROUP_RANK", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_ID")
LONG = timedelta(seconds=60)
"""Longer than any of these tests may take: where it is waited for, the test has failed."""


@contextmanager
def placed(**places: int) -> Iterator[None]:
    """Pretend that this rank runs at ``places``, and nowhere else."""
    before = {name: os.environ.pop(name, None) for name in PLACES}
    os.environ.update({name: str(value) for name, value in places.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def two_nodes(*, is_numbered: bool = True):
    node, local_rank = divmod(dist.get_rank(), 2)
    return placed(LOCAL_RANK=local_rank, GROUP_RANK=node) if is_numbered else placed(LOCAL_RANK=local_rank)


def note(log: Path, text: str) -> None:
    with log.open("a") as file:  # one short line in append mode comes whole and in order
        file.write(f"{text}\n")


def outcome(act: Callable[[], object]) -> tuple[str, str]:
    """Return the kind and the words of what ``act`` raises."""
    try:
        act()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "", ""


def num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_names)
