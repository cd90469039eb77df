"""Notice that a rank of the job failed, died or stalls, say which and where, and end this process with it.

A thread of every rank looks once a second, over a connection of its own to the job's store, so that it works
whatever the main thread is stuck in. It costs one small request a second and nothing in the train loop.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from automodel.distributed.runtime.awake import AwakeClock, moments
from automodel.distributed.runtime.dist_info import DistInfo
from automodel.distributed.runtime.flight_recorder import PREFIX, last_collective, write_record
from automodel.processes import is_alive, process_space
from automodel.screen import show_phase
from automodel.types import ExitStatus

INTERVAL_SEC = 1.0
GRACE_SEC = 4.0
"""How long the main thread has, after a failure elsewhere, to end in its own words."""
ANSWER_SEC = 3.0
"""How long the ranks have to say where they are."""
HEARTBEAT_SEC = 5.0
SILENCE_SEC = 40.0
"""Without a heartbeat for so long, a rank on another node is taken for dead."""

_FAILURE, _STALL = "watchdog/failure", "watchdog/stall"
_WAITING_FILES = (
    "/torch/distributed/",
    "/torch/nn/parallel/",
    "/torch/autograd/graph.py",
    "/torch/cuda/",
    "/automodel/distributed/",
)
"""Where the innermost frame of a rank is that waits for the others: in a collective, in a backward full of them, or
for the device."""


@dataclass
class _Place:
    """What the main thread is at, as it says itself."""

    phase: str = "starting"
    step: int | None = None

    def __str__(self) -> str:
        return self.phase if self.step is None else f"{self.phase}, step {self.step}"


_place = _Place()
_limit_sec = 60.0


def set_phase(phase: str, *, step: int | None = None) -> None:
    """Note what this rank does from now on (``training``, ``saving``, ...), for the message about a stall.

    A phase that belongs to no step is shown on the screen.
    """
    _place.phase, _place.step = phase, step
    if step is None:
        show_phase(phase)


def set_stall_limit(collective_timeout_minutes: float) -> None:
    """Set how long collectives may take from now on.

    A stall is told when nine tenths of that are over, and at least some seconds before the end, when the backend
    would raise an error that names nobody.
    """
    global _limit_sec
    timeout_sec = 60 * collective_timeout_minutes
    _limit_sec = max(0.5 * timeout_sec, min(0.9 * timeout_sec, timeout_sec - 10))


@dataclass(frozen=True)
class Failure:
    """What ended the job: which rank, in what words, and which rank says so."""

    rank: int
    error: str
    told_by: int


@dataclass(frozen=True)
class Report:
    """Where one rank is while the job stalls."""

    rank: int
    host: str
    pid: int
    place: str
    is_waiting: bool
    stuck_sec: int
    stack: str
    last_collective: str = ""


class Watchdog:
    """The watching thread of this rank.

    Args:
        store: the job's store; a connection of its own is made from it.
        tell: shows the user what a stall looks like.
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
        tell: Callable[[str], None],
        before_exit: Callable[[Failure], None],
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.tell, self.before_exit = tell, before_exit
        self.store = store.clone()
        self._main = threading.main_thread().ident
        self._position: tuple[int, int] | None = None
        self._clock = AwakeClock()  # for this thread alone, which reads it at every look
        self._now = 0.0
        self._position_since = 0.0
        self._beats = 0
        self._next_beat = 0.0
        self._neighbour_beat: tuple[bytes, float] = (b"", 0.0)
        self._local_peers: dict[int, int] = {}
        self._unreachable_since: float | None = None
        self._has_reported = False
        self._stop = threading.Event()
        self.store.set(f"watchdog/pid/{rank}", f"{process_space()} {os.getpid()}")
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """End watching, and tell the others that this rank ends on purpose."""
        self._stop.set()
        self._tell(f"watchdog/left/{self.rank}", "1")

    def fail(self, error: str) -> Failure:
        """End watching, tell the others that this rank failed, and return the failure that was told first."""
        self._stop.set()
        return self._claim(Failure(self.rank, error, self.rank))

    def failure(self) -> Failure | None:
        """Return the failure that was told first, or None."""
        try:
            if self.store.check([_FAILURE]):
                return Failure(**json.loads(self.store.get(_FAILURE)))
        except (RuntimeError, ValueError):  # the store has gone with its host
            pass
        return None

    def _tell(self, key: str, text: str) -> None:
        try:
            self.store.set(key, text)
        except RuntimeError:  # the store has gone with its host, and so has everybody who could read it
            return

    def _claim(self, failure: Failure) -> Failure:
        text = json.dumps(asdict(failure))
        try:
            return Failure(**json.loads(self.store.compare_set(_FAILURE, "", text)))
        except (RuntimeError, ValueError):
            return failure

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_SEC):
            self._now = self._clock.read()
            try:
                self._look()
                self._unreachable_since = None
            except RuntimeError:
                self._unreachable_since = self._unreachable_since or self._now
                if self._now - self._unreachable_since > SILENCE_SEC:
                    words = "the job's store, on its node, does not answer any more"
                    self._end(Failure(0, words, self.rank))

    def _look(self) -> None:
        found = self.failure()
        if found is not None:
            self._end(found)
        self._watch_neighbours()
        self._watch_position()
        if self.store.check([_STALL]) and not self._has_reported:
            self._has_reported = True
            self._answer()
        if self._is_stalled() and self.store.compare_set(_STALL, "", str(self.rank)) == str(self.rank).encode():
            self._tell_stall()

    def _watch_neighbours(self) -> None:
        """Look whether the processes of this node live, and whether the next rank's heart beats.

        Of a process of this node its heart may rest: it lives, and is stopped, by a scheduler perhaps.
        """
        for rank, pid in self._peers_of_this_node().items():
            if not is_alive(pid) and not self.store.check([f"watchdog/left/{rank}"]):
                self._accuse(rank, "its process ended without a word (killed, or out of memory?)")
        if self._now < self._next_beat:
            return
        self._next_beat = self._now + HEARTBEAT_SEC
        self._beats += 1
        self.store.set(f"watchdog/beat/{self.rank}", str(self._beats))
        neighbour = (self.rank + 1) % self.world_size
        key = f"watchdog/beat/{neighbour}"
        beat = self.store.get(key) if self.store.check([key]) else b""
        is_excused = neighbour in self._local_peers or self.store.check([f"watchdog/left/{neighbour}"])
        if beat != self._neighbour_beat[0] or is_excused:
            self._neighbour_beat = (beat, self._now)
        elif self._now - self._neighbour_beat[1] > SILENCE_SEC:
            self._accuse(neighbour, f"it has given no sign of life for {SILENCE_SEC:.0f} seconds")

    def _accuse(self, rank: int, error: str) -> None:
        failure = Failure(rank, error, self.rank)
        if self._claim(failure) == failure:
            self.tell(f"rank {rank} failed in {_place}: {error}")

    def _peers_of_this_node(self) -> dict[int, int]:
        if not self._local_peers:
            keys = [f"watchdog/pid/{rank}" for rank in range(self.world_size)]
            if not self.store.check(keys):
                return {}
            here = process_space()
            found = [value.decode().rsplit(" ", 1) for value in self.store.multi_get(keys)]
            self._local_peers = {rank: int(pid) for rank, (host, pid) in enumerate(found) if host == here}
        return self._local_peers

    def _watch_position(self) -> None:
        frame = sys._current_frames().get(self._main)
        position = (id(frame), frame.f_lasti) if frame is not None else None
        if position != self._position:
            self._position, self._position_since = position, self._now

    def _is_stalled(self) -> bool:
        frame = sys._current_frames().get(self._main)
        return _is_waiting(frame) and self._now - self._position_since > _limit_sec

    def _answer(self) -> None:
        frame = sys._current_frames().get(self._main)
        report = Report(
            self.rank,
            socket.gethostname(),
            os.getpid(),
            str(_place),
            _is_waiting(frame),
            round(self._now - self._position_since),
            "".join(traceback.format_stack(frame)[-8:]) if frame else "",
            last_collective(),
        )
        if self.record_folder is not None:
            write_record(self.record_folder)
        self.store.set(f"watchdog/report/{self.rank}", json.dumps(asdict(report)))
        if not report.is_waiting:
            words = f"rank {self.rank} keeps the others waiting; it is here:\n{report.stack}"
            print(words, file=sys.stderr, flush=True)

    def _tell_stall(self) -> None:
        """Gather where everybody is, print it, and make it the job's failure."""
        self._has_reported = True
        self._answer()
        missing = set(range(self.world_size))
        reports: list[Report] = []
        for _ in moments(ANSWER_SEC):
            for rank in sorted(missing):
                if self.store.check([f"watchdog/report/{rank}"]):
                    reports.append(Report(**json.loads(self.store.get(f"watchdog/report/{rank}"))))
            missing -= {report.rank for report in reports}
            if not missing:
                break
        late = late_ranks(reports) or sorted(missing) or [self.rank]
        failure = Failure(late[0], f"stalled in {_place}", self.rank)
        if self._claim(failure) == failure:
            message = stall_message(reports, mute=sorted(missing))
            if self.record_folder is not None and self.record_folder.is_dir():
                message += (
                    f"\nthe last collectives of each rank: torchfrtrace -j --prefix {PREFIX} {self.record_folder}"
                )
            self.tell(message)
        for rank in missing & self._local_peers.keys():
            os.kill(self._local_peers[rank], signal.SIGKILL)  # stopped as it is, it would outlast a launcher's TERM

    def _end(self, failure: Failure) -> None:
        """Give the main thread a moment to end in its own words, then end the process."""
        if self._stop.wait(GRACE_SEC):
            return
        self.before_exit(failure)
        print(f"rank {self.rank} ends because rank {failure.rank} failed: {failure.error}", file=sys.stderr, flush=True)
        os._exit(ExitStatus.FAILED)


def start_watchdog(
    info: DistInfo,
    collective_timeout_minutes: float,
    *,
    tell: Callable[[str], None],
    before_exit: Callable[[Failure], None],
) -> Watchdog | None:
    """Start watching the job that this process has joined; None where it is alone."""
    set_stall_limit(collective_timeout_minutes)
    if info.world_size == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    return Watchdog(store, rank=info.rank, world_size=info.world_size, tell=tell, before_exit=before_exit)


def late_ranks(reports: Sequence[Report]) -> list[int]:
    """Return the ranks that do not wait in a collective: it is they whom the others wait for."""
    return sorted(report.rank for report in reports if not report.is_waiting)


def stall_message(reports: Sequence[Report], *, mute: Sequence[int]) -> str:
    """Return who waits, who did not arrive and where that one is, each stack once."""
    late = late_ranks(reports)
    waiting = sorted(report.rank for report in reports if report.is_waiting)
    longest = max((report.stuck_sec for report in reports if report.is_waiting), default=0)
    lines = [f"stalled: {_ranks(waiting)} waited {longest} s; did not arrive: {_ranks(late + list(mute))}"]
    if not late and not mute:
        lines = [f"stalled: every rank has waited for the others for {longest} s; they do not agree on what comes next"]
    lines += [f"{_ranks(mute)}: no answer at all; the process is stopped, or its node is gone"] if mute else []
    groups: dict[tuple[str, str, str], list[Report]] = defaultdict(list)
    for report in sorted(reports, key=lambda report: report.is_waiting):
        groups[report.place, report.stack, report.last_collective].append(report)
    for (place, stack, last), members in groups.items():
        hosts = sorted({f"{member.host} pid {member.pid}" for member in members})
        state = "waiting" if members[0].is_waiting else "late"
        lines += [f"{_ranks([member.rank for member in members])} ({', '.join(hosts)}), {state} in {place}:"]
        lines += [stack.rstrip()]
        lines += [f"  last collective: {last}"] if last else []
    return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + (", ".join(map(str, sorted(ranks))) or "none")


def _is_waiting(frame: FrameType | Any) -> bool:
    return frame is not None and any(part in frame.f_code.co_filename for part in _WAITING_FILES)
