"""Let one rank of every node go first (to download, to build a cache), and have all ranks hear how it went."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ContextDecorator
from datetime import timedelta
from types import TracebackType
from typing import Literal, TypeVar

import torch.distributed as dist

from automodel.distributed.runtime.agreement import PeerError, picklable_error
from automodel.distributed.runtime.dist_info import (
    get_local_rank_preinit,
    get_rank_safe,
    get_store,
    get_world_size_safe,
)
from automodel.distributed.runtime.rendezvous import meet
from automodel.distributed.runtime.side_group import (
    TEN_HOURS,
    _create_gloo_group,
    fresh_name,
    no_stall_within,
)
from automodel.environment import number_from, slurm_exports
from automodel.logs import get_logger
from automodel.types import ExitStatus, UserError

T = TypeVar("T")

REASON_SEC = 1.0
"""How long a rank whose connection broke looks for the reason that another one may give."""

_JOB = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_open_turns: list[_Turn] = []
_hook: Callable[[type[BaseException], BaseException, TracebackType | None], None] | None = None


class FirstRankPerNode(ContextDecorator):
    """Run a block first on one rank of every node, and on the other ranks once it is done on all nodes.

    For ``with`` (the target tells whether this rank is its node's first) and as a decorator, whose function every
    rank calls. Every rank of the group must enter. The first of a node is the rank with the lowest local rank. A
    block inside another one of the same ranks is part of it: it waits for nobody.

    Without a process group one is started for the time of the block, if RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT are set or follow from a SLURM step; with nothing there, the block simply runs.

    An error in the block, of any kind, ends the block on every rank: where a first rank fails, the ranks that
    wait for it raise instead of running the block. The failing rank raises its own error. Where nobody handles it, the
    process ends at once, and with it the waits of ranks that do not take part.

    Args:
        timeout: how long each wait may take: for the ranks to come, for the first ranks, and for the others.
        group: the ranks that take part, which are the only ones to enter; all ranks by default.

    Raises:
        UserError: another rank raised one.
        PeerError: another rank raised something else, or a rank ended or lost its connection.
        TimeoutError: ranks did not come in time; the message tells which.
    """

    def __init__(self, *, timeout: timedelta = TEN_HOURS, group: dist.ProcessGroup | None = None) -> None:
        self._timeout, self._group = timeout, group
        self._turns: list[_Turn] = []

    def __enter__(self, timeout: timedelta | None = None) -> bool:
        """Wait for this rank's turn and return whether it is its node's first; ``timeout`` as for the class."""
        turn = _Turn(timeout or self._timeout)
        turn.begin(self._group, owns_world=self._try_bootstrap_pg(timeout))
        self._turns.append(turn)
        return turn.is_first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if error is not None:
            _end_if_unhandled()
        self._turns.pop().end(error)
        return False

    def _try_bootstrap_pg(self, timeout: timedelta | None = None) -> bool:
        """Start a gloo process group from the environment if there is none, and return whether one was started.

        All ranks that the environment speaks of must call it. In a SLURM step, torchrun's variables are exported.
        ``timeout`` as for the class.
        """
        if dist.is_initialized():
            return False
        os.environ.update(slurm_exports(os.environ))
        if not all(name in os.environ for name in _JOB):
            return False
        timeout = timeout or self._timeout
        rank, world_size = get_rank_safe(), get_world_size_safe()
        started, minutes = time.monotonic(), timeout.total_seconds() / 60
        try:
            store = meet(rank, world_size, minutes)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        except RuntimeError as error:
            is_late = time.monotonic() - started > 0.9 * 60 * minutes
            raise (TimeoutError if is_late else PeerError)(str(error)) from error
        return True


def node_group(timeout: timedelta = TEN_HOURS) -> dist.ProcessGroup:
    """Return a new gloo group of the ranks of this node, in their order; every rank of the job must call it."""
    nodes: list = [None] * dist.get_world_size()
    rank = dist.get_rank()
    dist.all_gather_object(nodes, _node(rank, get_local_rank_preinit()))
    return _create_gloo_group(timeout, [other for other, node in enumerate(nodes) if node == nodes[rank]])


def barrier_and_log(string: str) -> None:
    """Wait for all ranks, then log ``string`` on the main rank; every rank must call it."""
    if dist.is_initialized():
        dist.barrier()
    if get_rank_safe() == 0:
        get_logger(__name__).info(string)


class _Turn:
    """One passage of this rank through a block, in a gloo group of its own that it shares with the other ranks."""

    def __init__(self, timeout: timedelta) -> None:
        self.is_first = True
        self.ranks: list[int] = []
        self._timeout = timeout
        self._group: dist.ProcessGroup | None = None
        self._store: dist.Store | None = None
        self._num_meetings = 0
        self._owns_world = False

    def begin(self, group: dist.ProcessGroup | None, *, owns_world: bool) -> None:
        """Find the other ranks, and wait for the first of every node if this is not one."""
        self._owns_world = owns_world
        try:
            if dist.is_initialized():
                self._join(group)
            if not self.is_first:
                self._share(None, "the first rank of every node to end the block")
        except BaseException:
            self._close()
            raise
        _open_turns.append(self)

    def end(self, error: BaseException | None) -> None:
        """Tell the others how the block went on this rank, and wait for them."""
        _open_turns.remove(self)
        try:
            if self.is_first:
                self._share(error, "the first ranks of the other nodes to end the block")
                if error is not None:
                    return  # everybody has heard, and ends without a second meeting
                self._share(None, "the other ranks of the nodes to run the block")
            else:
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
            return
        if len(self.ranks) == 1:
            return
        self._store = dist.PrefixStore(fresh_name("first_rank/turn", self.ranks), get_store())
        self._group = self._meet(lambda: _create_gloo_group(self._timeout, self.ranks), "all ranks to come")
        rank, local_rank = dist.get_rank(), get_local_rank_preinit()
        node = _node(rank, local_rank)
        places = self._exchange((node, local_rank, rank), "all ranks to come")
        self.is_first = rank == min(place for place in places if place[0] == node)[-1]

    def _share(self, error: BaseException | None, awaited: str) -> None:
        """Meet the others and raise what one of them failed at, unless this rank has an error of its own."""
        try:
            told = self._exchange(picklable_error(error), awaited)
        except (PeerError, TimeoutError):
            if error is None:
                raise
            return
        if error is not None:
            return
        for rank, failure in zip(self.ranks, told, strict=True):
            if isinstance(failure, UserError):
                raise failure
            if failure is not None:
                raise PeerError(f"rank {rank} failed: {failure!r}") from failure

    def _exchange(self, value: T, awaited: str) -> list[T]:
        if self._group is None:
            return [value] * len(self.ranks)
        told: list = [None] * len(self.ranks)
        self._meet(lambda: dist.all_gather_object(told, value, group=self._group), awaited)
        return told

    def _meet(self, collective: Callable[[], T], awaited: str) -> T:
        """Run ``collective``; where it fails, raise what is known about the reason, in the same words on all ranks."""
        self._num_meetings += 1
        started = time.monotonic()
        try:
            with no_stall_within(self._timeout):
                self._store.set(f"{self._num_meetings}/{dist.get_rank()}", "here")
                return collective()
        except RuntimeError as error:
            # The frames of the traceback hold the group, whose connections close with its last reference: only
            # that tells the other ranks that this one does not wait any more.
            cause = error.with_traceback(None)
        is_late = time.monotonic() - started > 0.9 * self._timeout.total_seconds()
        kind, words = self._reason(awaited, is_late)
        raise (TimeoutError if kind == "late" else PeerError)(words) from cause

    def _reason(self, awaited: str, is_late: bool) -> tuple[str, str]:
        """Return (``late`` or ``lost``, words): what another rank says of this meeting, or else what this one knows."""
        rank = dist.get_rank()
        kind, words = "lost", f"a rank ended or lost its connection while rank {rank} waited for {awaited}"
        if is_late:
            kind, words = "late", f"rank {rank} waited {self._timeout.total_seconds():g} s for {awaited}"
        verdict = f"{self._num_meetings}/verdict"
        try:
            deadline = time.monotonic() + (0 if is_late else REASON_SEC)
            while not self._store.check([verdict]) and time.monotonic() < deadline:
                time.sleep(0.05)
            absent = [other for other in self.ranks if not self._store.check([f"{self._num_meetings}/{other}"])]
            if absent:
                words += f"; not there yet: rank {', '.join(map(str, absent))}"
            return tuple(json.loads(self._store.compare_set(verdict, "", json.dumps([kind, words]))))
        except RuntimeError:  # the store has gone with its host
            return kind, words

    def _close(self) -> None:
        group, self._group, self._store = self._group, None, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
        if self._owns_world:
            dist.destroy_process_group()


def _end_if_unhandled() -> None:
    """Have this process end at once after an error that nobody handles.

    The end of the interpreter would wait for threads, while ranks outside of the block wait for this one.
    """
    global _hook
    hook = sys.excepthook
    if hook is _hook:
        return

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        hook(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ExitStatus.FAILED)

    sys.excepthook = _hook = end


def _node(rank: int, local_rank: int) -> tuple[str, int]:
    """Return what the ranks of one node have in common, and no others."""
    node = number_from(os.environ, ("GROUP_RANK", "SLURM_NODEID"), default=-1)
    # Without a number of the node, ranks are taken to be numbered node by node, each from local rank 0.
    return ("number", node) if node >= 0 else ("rank of local rank 0", rank - local_rank)
