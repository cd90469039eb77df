"""What a stall looks like from one rank, and the message made of all ranks' reports."""

from __future__ import annotations

import os
import socket
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from automodel.distributed.runtime.flight_recorder import last_collective
from automodel.distributed.runtime.rendezvous import name_ranks

_WAITING_FILES = (
    "/torch/distributed/",
    "/torch/nn/parallel/",
    "/torch/autograd/graph.py",
    "/torch/cuda/",
    "/automodel/distributed/",
)
"""Files of the innermost frame of a rank that waits for others: in a collective, in a backward full of them, or for the
device."""
_NUM_FRAMES = 8  # of ours and torch's: enough to show which call of the step or the save it is


@dataclass(frozen=True)
class Report:
    """Where one rank is while the job stalls."""

    rank: int
    host: str
    pid: int
    phase: str
    is_waiting: bool
    stuck_sec: int
    stack: str
    last_collective: str = ""

    @classmethod
    def of_this_rank(cls, rank: int, *, phase: str, frame: FrameType | None, stuck_sec: float) -> Report:
        """Describe this rank, whose main thread has been at ``frame`` for ``stuck_sec``."""
        stack = "".join(traceback.format_stack(frame)[-_NUM_FRAMES:]) if frame else ""
        host, pid = socket.gethostname(), os.getpid()
        return cls(rank, host, pid, phase, is_wait(frame), round(stuck_sec), stack, last_collective())


def is_wait(frame: FrameType | None) -> bool:
    """Return whether a thread whose innermost frame is ``frame`` waits for other ranks or the device."""
    return frame is not None and any(part in frame.f_code.co_filename for part in _WAITING_FILES)


def late_ranks(reports: Sequence[Report]) -> list[int]:
    """Return the ranks that do not wait in a collective, and so keep the others waiting."""
    return sorted(report.rank for report in reports if not report.is_waiting)


def stall_message(reports: Sequence[Report], *, mute: Sequence[int]) -> str:
    """Say who waits, who did not arrive (``mute`` ranks gave no report) and where each of them is, each stack once."""
    late = late_ranks(reports)
    waiting = [report for report in reports if report.is_waiting]
    longest = max((report.stuck_sec for report in waiting), default=0)
    if late or mute:
        names = name_ranks(report.rank for report in waiting)
        lines = [f"stalled: {names} waited {longest} s; did not arrive: {name_ranks([*late, *mute])}"]
    else:
        lines = [f"stalled: every rank has waited for the others for {longest} s; they disagree on what comes next"]
    if mute:
        lines.append(f"{name_ranks(mute)}: no answer at all; the process is stopped, or its node is gone")
    groups: dict[tuple[str, str, str], list[Report]] = defaultdict(list)
    for report in sorted(reports, key=lambda report: report.is_waiting):
        groups[report.phase, report.stack, report.last_collective].append(report)
    for (phase, stack, last), members in groups.items():
        hosts = sorted({f"{member.host} pid {member.pid}" for member in members})
        state = "waiting" if members[0].is_waiting else "late"
        lines.append(f"{name_ranks(member.rank for member in members)} ({', '.join(hosts)}), {state} in {phase}:")
        lines.append(stack.rstrip())
        if last:
            lines.append(f"  last collective: {last}")
    return "\n".join(lines)
