"""Let one rank do something and report the outcome to every rank."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
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
    """The failure of another rank, which itself shows the traceback."""


class CutShort(Exception):
    """Raised on every rank where long work ended early because a rank was asked to stop."""


class StopPoll:
    """Lets ranks in the midst of long work, such as an evaluation, learn that one of them was asked to stop.

    Args:
        wants_stop: whether this rank was asked to.
    """

    def __init__(self, wants_stop: Callable[[], bool]) -> None:
        self._wants_stop = wants_stop
        self._vote: tuple[torch.Tensor, dist.Work] | None = None

    def raise_if_agreed(self) -> None:
        """Raise CutShort on every rank if one of them was asked to stop; all ranks must call it equally often.

        The ranks vote on the host. Each call reads the result of the previous call's vote, so nobody waits for it.
        """
        if dist.get_world_size() == 1:
            if self._wants_stop():
                raise CutShort
            return
        previous, flag = self._vote, torch.tensor(int(self._wants_stop()))
        self._vote = (flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True))
        if previous is not None:
            wait_for(previous[1])
            if previous[0].item():
                raise CutShort

    def is_heard(self) -> bool:
        """Return whether this rank, or another one that called this, was asked to stop; not a collective."""
        wants_stop = self._wants_stop()
        if wants_stop:
            get_store().set(_STOP, "1")
        return wants_stop or get_store().check([_STOP])


def run_on_main(action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on rank 0 alone and return its result on every rank; every rank must call it.

    The result travels pickled, over ``group`` (of all ranks; None: the main one). If the action raises, every rank
    raises: rank 0 the same error, the others a copy of it, or a PeerError if it cannot be pickled.
    """
    result, failure = _attempt(action) if dist.get_rank() == 0 else (None, None)
    box = [result, picklable_error(failure)]
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1] if failure is None else failure
    return box[0]


def run_on_all_ranks(action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on every rank and return its result, or raise on every rank if it failed on any of them.

    Every rank must call it. A rank raises its own error; the others raise that of the lowest failing rank, of which
    they learn over ``group`` (of all ranks; None: the main one).
    """
    result, failure = _attempt(action)
    failures = on_every_rank(picklable_error(failure), group=group)
    if failure is not None:
        raise failure
    raise_first(dict(enumerate(failures)))
    return result


def on_every_rank(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the value of each rank, by rank; every rank must call it. Values are pickled."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def raise_first(errors: Mapping[int, BaseException | None]) -> None:
    """Raise the first of the errors of other ranks, by rank: a UserError as it is, another one as a PeerError."""
    for rank, error in errors.items():
        if isinstance(error, UserError):
            raise error
        if error is not None:
            raise PeerError(f"rank {rank} failed: {error!r}") from error


def picklable_error(error: BaseException | None) -> BaseException | None:
    """Return ``error`` as other processes can read it: itself if it survives pickling."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return PeerError(f"{type(error).__name__}: {error}")


def set_collective_timeout(timeout_minutes: float) -> None:
    """Set how long collectives may take from now on, in the main group and those of meshes; every rank should call it.

    The watchdog reports a stall shortly before that. Side groups keep their own time-outs.
    """
    set_stall_limit(timeout_minutes)
    for group, name in dist.distributed_c10d._world.pg_names.items():
        if not name.startswith(NAME_PREFIX):
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)


@contextmanager
def collective_timeout(timeout_minutes: float, *, then_minutes: float) -> Iterator[None]:
    """Give a slow phase (a save, an export) its own time-out; ``then_minutes`` applies after it."""
    set_collective_timeout(timeout_minutes)
    try:
        yield
    finally:
        set_collective_timeout(then_minutes)


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error
