"""Let one rank of every node go first (to download, to build a cache), and report the outcome to all ranks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import ContextDecorator
from datetime import timedelta
from types import TracebackType
from typing import Literal, TypeVar

import torch.distributed as dist

from automodel.distributed.runtime.agreement import PeerError, on_every_rank, picklable_error, raise_first
from automodel.distributed.runtime.awake import poll_for
from automodel.distributed.runtime.dist_info import (
    get_local_rank_preinit,
    get_rank_safe,
    get_store,
    get_world_size_safe,
)
from automodel.distributed.runtime.rendezvous import name_ranks, rendezvous
from automodel.distributed.runtime.side_group import TEN_HOURS, _create_gloo_group, fresh_name
from automodel.distributed.runtime.watchdog import no_stall_within
from automodel.environment import number_from, slurm_exports
from automodel.logs import get_logger

T = TypeVar("T")

REASON_SEC = 1.0
"""How long a rank whose connection broke waits for a rank that timed out, and so broke it, to say so."""

_JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FIRST_RANKS = "the first rank of every node to end the block"
_open_turns: list[_Turn] = []


class FirstRankPerNode(ContextDecorator):
    """Run a block first on one rank of every node, and on the other ranks once it is done on all nodes.

    For ``with`` (the target says whether this rank is its node's first) and as a decorator, whose function every
    rank calls. Every rank of the group must enter. The first of a node is the rank with the lowest local rank. A
    block inside another one of the same ranks is part of it: it waits for nobody.

    Without a process group one is started for the time of the block, if RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT are set or follow from a SLURM step; otherwise, the block simply runs.

    An error in the block, of any kind, ends the block on every rank: where a first rank fails, the ranks that
    wait for it raise instead of running the block. The failing rank raises its own error.

    Args:
        timeout: how long each wait may take: for the ranks to come, for the first ranks, and for the others.
        group: the ranks that take part, which are the only ones to enter; all ranks by default.

    Raises:
        UserError: another rank raised one.
        PeerError: another rank raised something else, or a rank ended or lost its connection.
        TimeoutError: ranks did not come in time; the message names them.
    """

    def __init__(self, *, timeout: timedelta = TEN_HOURS, group: dist.ProcessGroup | None = None) -> None:
        self._timeout, self._group = timeout, group
        self._turns: list[_Turn] = []

    def __enter__(self, timeout: timedelta | None = None) -> bool:
        """Wait for this rank's turn and return whether it is its node's first; ``timeout`` as for the class."""
        turn = _Turn(timeout or self._timeout, owns_world=self._try_bootstrap_pg(timeout))
        turn.begin(self._group)
        self._turns.append(turn)
        return turn.is_first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self._turns.pop().end(error)
        return False

    def _try_bootstrap_pg(self, timeout: timedelta | None = None) -> bool:
        """Start a gloo process group from the environment if there is none, and return whether one was started.

        All ranks of the environment's job must call it. In a SLURM step, torchrun's variables are exported.
        ``timeout`` as for the class.
        """
        if dist.is_initialized():
            return False
        os.environ.update(slurm_exports(os.environ))
        if not all(name in os.environ for name in _JOB):
            return False
        timeout = timeout or self._timeout
        rank, world_size, started = get_rank_safe(), get_world_size_safe(), time.monotonic()
        try:
            store = rendezvous(rank, world_size, timeout.total_seconds() / 60)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        except RuntimeError as error:
            raise (TimeoutError if _is_over(timeout, started) else PeerError)(str(error)) from error
        return True


def node_group(timeout: timedelta = TEN_HOURS) -> dist.ProcessGroup:
    """Return a new gloo group of the ranks of this node, in their order; every rank of the job must call it."""
    rank = dist.get_rank()
    nodes = on_every_rank(_node(rank, get_local_rank_preinit()))
    return _create_gloo_group(timeout, [other for other, node in enumerate(nodes) if node == nodes[rank]])


def barrier_and_log(string: str) -> None:
    """Wait for all ranks, then log ``string`` on the main rank; every rank must call it."""
    if dist.is_initialized():
        dist.barrier()
    if get_rank_safe() == 0:
        get_logger(__name__).info(string)


class _Turn:
    """One passage of this rank through a block, in a gloo group of its own that it shares with the other ranks."""

    def __init__(self, timeout: timedelta, *, owns_world: bool) -> None:
        self.is_first = True
        self.ranks: list[int] = []
        self._timeout, self._owns_world = timeout, owns_world
        self._group: dist.ProcessGroup | None = None
        self._store: dist.Store | None = None
        self._num_waits = 0

    def begin(self, group: dist.ProcessGroup | None) -> None:
        """Find the other ranks, and wait for the first of every node if this is not one."""
        try:
            if dist.is_initialized():
                self._join(group)
            if not self.is_first:
                self._share(None, _FIRST_RANKS)
        except BaseException:
            self._close()
            raise
        _open_turns.append(self)

    def end(self, error: BaseException | None) -> None:
        """Report to the others how the block went on this rank, and wait for them."""
        _open_turns.remove(self)
        try:
            if self.is_first:
                self._share(error, _FIRST_RANKS)
            if error is None or not self.is_first:  # after a first rank's error, nobody runs the block
                self._share(error, "all ranks to end the block")
        finally:
            self._close()

    def _join(self, group: dist.ProcessGroup | None) -> None:
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"rank {dist.get_rank()} is not in the given group; only the group's ranks may enter")
        self.ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        outer = next((turn for turn in _open_turns if turn.ranks == self.ranks), None)
        if outer is not None:
            self.is_first = outer.is_first
        elif len(self.ranks) > 1:
            self._store = dist.PrefixStore(fresh_name("first_rank/turn", self.ranks), get_store())
            self._group = self._wait(lambda: _create_gloo_group(self._timeout, self.ranks), "all ranks to come")
            rank, local_rank = dist.get_rank(), get_local_rank_preinit()
            node = _node(rank, local_rank)
            ranks = self._gather((node, local_rank, rank), "all ranks to come")
            self.is_first = rank == min(other for other in ranks if other[0] == node)[-1]

    def _share(self, error: BaseException | None, awaited: str) -> None:
        """Exchange errors with the other ranks, and raise one of theirs unless this rank has its own."""
        if self._group is None:
            return
        try:
            errors = self._gather(picklable_error(error), awaited)
        except (PeerError, TimeoutError):
            if error is None:
                raise
            return
        if error is None:
            raise_first(dict(zip(self.ranks, errors, strict=True)))

    def _gather(self, value: T, awaited: str) -> list[T]:
        values: list = [None] * len(self.ranks)
        self._wait(lambda: dist.all_gather_object(values, value, group=self._group), awaited)
        return values

    def _wait(self, collective: Callable[[], T], awaited: str) -> T:
        """Run ``collective``; if it fails, raise what is known about the reason, in the same words on all ranks."""
        self._num_waits += 1
        started = time.monotonic()
        try:
            with no_stall_within(self._timeout):
                self._store.set(f"{self._num_waits}/{dist.get_rank()}", "here")
                return collective()
        except RuntimeError as error:
            # The frames of the traceback hold the group, whose connections close with its last reference: only
            # that shows the other ranks that this one no longer waits.
            cause = error.with_traceback(None)
        is_late, message = self._reason(awaited, _is_over(self._timeout, started))
        raise (TimeoutError if is_late else PeerError)(message) from cause

    def _reason(self, awaited: str, is_late: bool) -> tuple[bool, str]:
        """Return (whether it took too long, message): another rank's reason for this failure, or else this rank's."""
        rank, verdict = dist.get_rank(), f"{self._num_waits}/verdict"
        message = f"a rank ended or lost its connection while rank {rank} waited for {awaited}"
        if is_late:
            message = f"rank {rank} waited {self._timeout.total_seconds():g} s for {awaited}"
        try:
            for _ in poll_for(0 if is_late else REASON_SEC):
                if self._store.check([verdict]):
                    break
            absent = [other for other in self.ranks if not self._store.check([f"{self._num_waits}/{other}"])]
            if absent:
                message += f"; not there yet: {name_ranks(absent)}"
            return tuple(json.loads(self._store.compare_set(verdict, "", json.dumps([is_late, message]))))
        except RuntimeError:  # the store has gone with its host
            return is_late, message

    def _close(self) -> None:
        group, self._group, self._store = self._group, None, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
        if self._owns_world:
            dist.destroy_process_group()


def _is_over(timeout: timedelta, started: float) -> bool:
    """Return whether a wait that failed took about as long as it may: the backend's clock is not ours."""
    return time.monotonic() - started > 0.9 * timeout.total_seconds()


def _node(rank: int, local_rank: int) -> tuple[str, int]:
    """Return what the ranks of one node have in common, and no others."""
    node = number_from(os.environ, ("GROUP_RANK", "SLURM_NODEID"), default=-1)
    # Without the node's index, ranks are assumed to be numbered node by node, each from local rank 0.
    return ("number", node) if node >= 0 else ("rank of local rank 0", rank - local_rank)
