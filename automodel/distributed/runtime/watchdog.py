"""Notice that a rank of the job failed, died or stalls, report which one and where, and end this process with it.

A thread of every rank looks once a second, over its own connection to the job's store, so it works even while the main
thread is stuck. It costs a few small requests a second and nothing in the train loop.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from automodel.distributed.runtime.awake import AwakeClock, poll_for
from automodel.distributed.runtime.dist_info import DistInfo, get_store
from automodel.distributed.runtime.flight_recorder import PREFIX, write_record
from automodel.distributed.runtime.stall_report import Report, is_wait, late_ranks, stall_message
from automodel.processes import is_alive, process_space
from automodel.screen import show_phase
from automodel.types import ExitStatus

INTERVAL_SEC = 1.0
GRACE_SEC = 4.0
"""How long the main thread has, after a failure elsewhere, to end by itself: it takes 2 s to learn which rank failed
first, and a moment to write that down."""
ANSWER_SEC = 3.0
"""How long the ranks have to report where they are: three looks."""
HEARTBEAT_SEC = 5.0
"""Rarer than looks, because the job's store answers the requests of all ranks one after another."""
SILENCE_SEC = 40.0
"""A rank on another node without a heartbeat for so long counts as dead: a network loses one or two, not eight."""

_phase = "starting"
_limit_sec = 60.0


def set_phase(phase: str, *, step: int | None = None) -> None:
    """Note what this rank does from now on (``training``, ``saving``, ...), for the message about a stall.

    A phase that belongs to no step is shown on the screen.
    """
    global _phase
    _phase = phase if step is None else f"{phase}, step {step}"
    if step is None:
        show_phase(phase)


def set_stall_limit(collective_timeout_minutes: float) -> None:
    """Set how long collectives may take from now on.

    A stall is reported after nine tenths of that, and at least 10 s (of short time-outs, half of them) before the end,
    when the backend would raise an error that names nobody.
    """
    global _limit_sec
    timeout_sec = 60 * collective_timeout_minutes
    _limit_sec = max(0.5 * timeout_sec, min(0.9 * timeout_sec, timeout_sec - 10))


@contextmanager
def no_stall_within(timeout: timedelta) -> Iterator[None]:
    """Allow a wait as long as ``timeout`` before it counts as a stall."""
    global _limit_sec
    before, _limit_sec = _limit_sec, max(_limit_sec, timeout.total_seconds())
    try:
        yield
    finally:
        _limit_sec = before


@dataclass(frozen=True)
class Failure:
    """What ended the job: the rank that failed, its error, and the rank that reported it."""

    rank: int
    error: str
    reported_by: int


class Watchdog:
    """The watching thread of this rank.

    Args:
        store: the job's store; the thread makes its own connection.
        report: shows the user what a stall or a dead rank looks like.
        before_exit: called with the failure before this process is ended because of another one.

    Attributes:
        record_folder: where the ranks of a stall write their last collectives, once it is known.
    """

    record_folder: Path | None = None

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        report: Callable[[str], None],
        before_exit: Callable[[Failure], None],
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._report, self._before_exit = report, before_exit
        self._store = dist.PrefixStore("watchdog", store.clone())
        self._main_thread = threading.main_thread().ident
        self._clock = AwakeClock()  # for this thread alone, which reads it at every look
        self._now = 0.0
        self._position: tuple[int, int] | None = None
        self._position_since = 0.0
        self._next_beat = 0.0
        self._neighbour_beat, self._neighbour_beat_at = b"", 0.0
        self._local_pids: dict[int, int] = {}
        self._store_lost_at: float | None = None
        self._has_answered = False
        self._stop = threading.Event()
        self._store.set(f"pid/{rank}", f"{process_space()} {os.getpid()}")
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def finish(self) -> None:
        """End watching, and let the others know that this rank ends on purpose."""
        self._stop.set()
        with suppress(RuntimeError):  # the store has gone with its host, and so has everyone who could read it
            self._store.set(f"finished/{self._rank}", "1")

    def fail(self, error: str) -> Failure:
        """End watching, report to the others that this rank failed, and return the failure that was reported first."""
        self._stop.set()
        return self._claim(Failure(self._rank, error, self._rank))

    def failure(self) -> Failure | None:
        """Return the failure that was reported first, or None."""
        with suppress(RuntimeError, ValueError):  # the store has gone with its host
            if self._store.check(["failure"]):
                return Failure(**json.loads(self._store.get("failure")))
        return None

    def _claim(self, failure: Failure) -> Failure:
        """Make ``failure`` the job's unless there is one, and return the job's."""
        with suppress(RuntimeError, ValueError):
            return Failure(**json.loads(self._store.compare_set("failure", "", json.dumps(asdict(failure)))))
        return failure

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_SEC):
            self._now = self._clock.read()
            try:
                self._look()
                self._store_lost_at = None
            except RuntimeError:
                self._store_lost_at = self._store_lost_at or self._now
                if self._now - self._store_lost_at > SILENCE_SEC:
                    self._end(Failure(0, "the job's store, on its node, no longer answers", self._rank))

    def _look(self) -> None:
        failure = self.failure()
        if failure is not None:
            self._end(failure)
        self._watch_processes()
        if self._now >= self._next_beat:
            self._next_beat = self._now + HEARTBEAT_SEC
            self._watch_neighbour()
        self._watch_main_thread()

    def _watch_processes(self) -> None:
        """Check that the processes of this node live."""
        keys = [f"pid/{rank}" for rank in range(self._world_size)]
        if not self._local_pids and self._store.check(keys):
            found = [value.decode().rsplit(" ", 1) for value in self._store.multi_get(keys)]
            self._local_pids = {rank: int(pid) for rank, (space, pid) in enumerate(found) if space == process_space()}
        for rank, pid in self._local_pids.items():
            if not is_alive(pid) and not self._has_finished(rank):
                self._accuse(rank, "its process ended without a word (killed, or out of memory?)")

    def _watch_neighbour(self) -> None:
        """Give a heartbeat and check the next rank's.

        A process of this node may be silent: it lives, and is stopped, perhaps by a scheduler.
        """
        self._store.set(f"beat/{self._rank}", str(self._now))
        neighbour = (self._rank + 1) % self._world_size
        key = f"beat/{neighbour}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        if beat != self._neighbour_beat or neighbour in self._local_pids or self._has_finished(neighbour):
            self._neighbour_beat, self._neighbour_beat_at = beat, self._now
        elif self._now - self._neighbour_beat_at > SILENCE_SEC:
            self._accuse(neighbour, f"it has given no sign of life for {SILENCE_SEC:.0f} seconds")

    def _has_finished(self, rank: int) -> bool:
        return self._store.check([f"finished/{rank}"])

    def _accuse(self, rank: int, error: str) -> None:
        failure = Failure(rank, error, self._rank)
        if self._claim(failure) == failure:
            self._report(f"rank {rank} failed in {_phase}: {error}")

    def _watch_main_thread(self) -> None:
        """Report a stall if the main thread has waited at one place for too long, and answer another rank's report."""
        frame = self._main_frame()
        position = (id(frame), frame.f_lasti) if frame is not None else None
        if position != self._position:
            self._position, self._position_since = position, self._now
        if self._store.check(["stall"]) and not self._has_answered:
            self._answer()
        me = str(self._rank)
        if self._is_stalled(frame) and self._store.compare_set("stall", "", me) == me.encode():
            self._report_stall()

    def _main_frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main_thread)

    def _is_stalled(self, frame: FrameType | None) -> bool:
        return is_wait(frame) and self._now - self._position_since > _limit_sec

    def _answer(self) -> None:
        """Report where this rank is."""
        self._has_answered = True
        stuck_sec = self._now - self._position_since
        report = Report.of_this_rank(self._rank, phase=_phase, frame=self._main_frame(), stuck_sec=stuck_sec)
        if self.record_folder is not None:
            write_record(self.record_folder)
        self._store.set(f"report/{self._rank}", json.dumps(asdict(report)))
        if not report.is_waiting:
            message = f"rank {self._rank} keeps the others waiting; it is here:\n{report.stack}"
            print(message, file=sys.stderr, flush=True)

    def _report_stall(self) -> None:
        """Gather where every rank is, show it, and make it the job's failure."""
        self._answer()
        mute = {f"report/{rank}": rank for rank in range(self._world_size)}
        reports: list[Report] = []
        for _ in poll_for(ANSWER_SEC):
            for key in [key for key in mute if self._store.check([key])]:
                reports.append(Report(**json.loads(self._store.get(key))))
                del mute[key]
            if not mute:
                break
        late = late_ranks(reports) or [*mute.values(), self._rank]
        failure = Failure(late[0], f"stalled in {_phase}", self._rank)
        if self._claim(failure) == failure:
            message = stall_message(reports, mute=[*mute.values()])
            if self.record_folder is not None and self.record_folder.is_dir():
                command = f"torchfrtrace -j --prefix {PREFIX} {self.record_folder}"
                message += f"\nthe last collectives of each rank: {command}"
            self._report(message)
        for rank in self._local_pids.keys() & mute.values():
            os.kill(self._local_pids[rank], signal.SIGKILL)  # stopped as it is, it would outlast a launcher's TERM

    def _end(self, failure: Failure) -> None:
        """Give the main thread a moment to end by itself, then end the process."""
        if self._stop.wait(GRACE_SEC):
            return
        self._before_exit(failure)
        message = f"rank {self._rank} ends because rank {failure.rank} failed: {failure.error}"
        print(message, file=sys.stderr, flush=True)
        os._exit(ExitStatus.FAILED)


def start_watchdog(
    info: DistInfo,
    collective_timeout_minutes: float,
    *,
    report: Callable[[str], None],
    before_exit: Callable[[Failure], None],
) -> Watchdog | None:
    """Start watching the job that this process has joined; None for a single process."""
    set_stall_limit(collective_timeout_minutes)
    if info.world_size == 1:
        return None
    return Watchdog(get_store(), rank=info.rank, world_size=info.world_size, report=report, before_exit=before_exit)
