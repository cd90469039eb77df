"""Let one rank do something and have every rank hear how it went."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from automodel.distributed.runtime.dist_info import get_store
from automodel.distributed.runtime.side_group import NAME_PREFIX
from automodel.distributed.runtime.waits import wait_for
from automodel.distributed.runtime.watchdog import set_stall_limit
from automodel.types import UserError

T = TypeVar("T")

_STOP = "stop/requested"


class PeerError(RuntimeError):
    """What another rank failed at; the traceback is that rank's to show."""


class CutShort(Exception):
    """Raised on every rank where long work ended early because a rank was asked to stop."""


class StopPoll:
    """Tells ranks in the midst of long work, such as an evaluation, that one of them was asked to stop.

    Args:
        wants_stop: whether this rank was asked to.
    """

    def __init__(self, wants_stop: Callable[[], bool]) -> None:
        self._wants_stop = wants_stop
        self._vote: tuple[torch.Tensor, dist.Work] | None = None

    def raise_if_agreed(self) -> None:
        """Raise CutShort on every rank where one of them was asked to; all ranks must call it equally often.

        The ranks vote on the host, and hear at a call how the vote of the call before went: so nobody waits for it.
        """
        if dist.get_world_size() == 1:
            if self._wants_stop():
                raise CutShort
            return
        before, flag = self._vote, torch.tensor(int(self._wants_stop()))
        self._vote = (flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True))
        if before is not None:
            wait_for(before[1])
            if before[0].item():
                raise CutShort

    def is_heard(self) -> bool:
        """Return whether this rank was asked to, or has heard that another one was; ranks need not call it together."""
        wants_stop = self._wants_stop()
        if wants_stop:
            get_store().set(_STOP, "1")
        return wants_stop or get_store().check([_STOP])


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
    box[1] = picklable_error(failure)
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise failure if failure is not None else box[1]
    return box[0]


def set_collective_timeout(timeout_minutes: float) -> None:
    """Set how long collectives may take from now on, in the main group and those of meshes; every rank should call it.

    The watchdog tells of a stall shortly before that. Groups beside the training's keep their own time-outs.
    """
    set_stall_limit(timeout_minutes)
    for group, name in dist.distributed_c10d._world.pg_names.items():
        if not name.startswith(NAME_PREFIX):
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)


@contextmanager
def collective_timeout(timeout_minutes: float, *, then_minutes: float) -> Iterator[None]:
    """Give a slow phase (a save, an export) its own time-out, and put ``then_minutes`` in force after it."""
    set_collective_timeout(timeout_minutes)
    try:
        yield
    finally:
        set_collective_timeout(then_minutes)


def run_on_all_ranks(action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on every rank and return its result, or raise on every rank when any one of them failed.

    Every rank must call it. A rank raises its own error; the others raise that of the lowest failing rank. They hear
    of it over ``group`` (of all ranks; None: the main one).
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    told = on_every_rank(picklable_error(failure), group=group)
    if failure is not None:
        raise failure
    for rank, error in enumerate(told):
        if error is not None:
            raise error if isinstance(error, UserError) else PeerError(f"rank {rank} failed: {error!r}") from error
    return result


def on_every_rank(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the value of each rank, by rank; every rank must call it. Values are pickled."""
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, value, group=group)
    return told


def picklable_error(error: Exception | None) -> Exception | None:
    """Return ``error`` as other processes can read it: itself where it survives pickling."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return PeerError(f"{type(error).__name__}: {error}")
