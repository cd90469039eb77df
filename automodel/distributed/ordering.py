"""Let one rank do something and have every rank hear how it went."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from automodel.distributed.watchdog import set_stall_limit
from automodel.types import UserError

T = TypeVar("T")


class PeerError(RuntimeError):
    """What another rank failed at; the traceback is that rank's to show."""


def run_on_main(action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on rank 0 alone and return its result on every rank; every rank must call it.

    The result travels pickled, over ``group`` (of all ranks; None: the main one). Where the action raises, rank 0
    raises the same error; the other ranks raise it too when it can be pickled, so that all ranks end alike and nobody
    waits.
    """
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except Exception as error:
            box[1] = error
    failure = box[1]
    box[1] = portable(failure)
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise failure if failure is not None else box[1]
    return box[0]


def set_collective_timeout(timeout_minutes: float) -> None:
    """Set how long the collectives of the main process group may take from now on; every rank should call it.

    The watchdog tells of a stall shortly before that.
    """
    set_stall_limit(timeout_minutes)
    dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), dist.group.WORLD)


@contextmanager
def collective_timeout(timeout_minutes: float, *, then_minutes: float) -> Iterator[None]:
    """Give a slow phase (a save, an export) its own time-out, and put ``then_minutes`` in force after it."""
    set_collective_timeout(timeout_minutes)
    try:
        yield
    finally:
        set_collective_timeout(then_minutes)


def everywhere(action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on every rank and return its result, or raise on every rank when any one of them failed.

    Every rank must call it. A rank raises its own error; the others raise that of the lowest failing rank. They hear
    of it over ``group`` (of all ranks; None: the main one).
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    told = on_every_rank(portable(failure), group=group)
    if failure is not None:
        raise failure
    for rank, error in enumerate(told):
        if error is not None:
            raise error if isinstance(error, UserError) else PeerError(f"rank {rank} failed: {error!r}") from error
    return result


def on_every_rank(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return what each rank gave, by rank; every rank must call it. The values travel pickled, as in ``everywhere``."""
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, value, group=group)
    return told


def portable(error: Exception | None) -> Exception | None:
    """Return ``error`` as other processes can read it: itself where it survives pickling."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return PeerError(f"{type(error).__name__}: {error}")
