"""What the watchdog says of a stall, and whom it takes for dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch.distributed as dist

from automodel.distributed.runtime import watchdog
from automodel.distributed.runtime.stall_report import Report, late_ranks, stall_message
from automodel.distributed.runtime.watchdog import set_stall_limit
from automodel.processes import is_alive, process_space
from tests.dist.pool import RankPool


def report(rank: int, *, is_waiting: bool, phase: str = "training, step 7") -> Report:
    stack = "  all_reduce\n" if is_waiting else "  time.sleep\n"
    return Report(rank, f"node-{rank // 2}", 100 + rank, phase, is_waiting, 540 if is_waiting else 541, stack)


def test_a_stall_names_phase_step_and_who_did_not_arrive_each_stack_once():
    reports = [report(0, is_waiting=True), report(1, is_waiting=True), report(3, is_waiting=False)]
    assert late_ranks(reports) == [3]
    assert stall_message(reports, mute=[2]).splitlines() == [
        "stalled: ranks 0, 1 waited 540 s; did not arrive: ranks 2, 3",
        "rank 2: no answer at all; the process is stopped, or its node is gone",
        "rank 3 (node-1 pid 103), late in training, step 7:",
        "  time.sleep",
        "ranks 0, 1 (node-0 pid 100, node-0 pid 101), waiting in training, step 7:",
        "  all_reduce",
    ]


def test_ranks_that_wait_for_one_another_in_different_places_are_shown():
    reports = [report(0, is_waiting=True, phase="evaluating, step 7"), report(1, is_waiting=True)]
    message = stall_message(reports, mute=[])
    assert "every rank has waited for the others" in message
    assert "evaluating, step 7" in message and "training, step 7" in message


@pytest.mark.parametrize(("minutes", "seconds"), [(10, 540), (0.5, 20), (0.1, 3)])
def test_a_stall_is_told_before_the_collective_gives_up(minutes, seconds):
    before = watchdog._limit_sec
    set_stall_limit(minutes)
    assert watchdog._limit_sec == pytest.approx(seconds)
    watchdog._limit_sec = before


def test_a_process_that_ended_is_dead_also_before_it_is_collected():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    deadline = time.monotonic() + 20
    while is_alive(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child.pid)  # a zombie: nobody has waited for it
    child.wait()
    assert not is_alive(child.pid) and is_alive(os.getpid())


def first_failure_wins() -> tuple[str, int, bool]:
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    dog = watchdog.Watchdog(store, rank=rank, world_size=2, report=print, before_exit=lambda failure: None)
    assert dog.failure() is None
    dist.barrier()
    if rank == 1:
        dog.fail("ValueError: first")
    dist.barrier()
    told = dog.fail("RuntimeError: an echo")
    dog.finish()
    return told.error, told.rank, dog.failure() == told


def test_the_failure_told_first_is_everybodys():
    pool = RankPool(2)
    assert pool.run(first_failure_wins) == [("ValueError: first", 1, True)] * 2
    pool.close()


def test_a_job_that_was_suspended_takes_nobody_for_dead_or_stalled_when_it_wakes(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(watchdog, "INTERVAL_SEC", 0.001)
    monkeypatch.setattr(watchdog, "_limit_sec", 100.0)
    store = dist.FileStore(tempfile.mkstemp()[1])
    store.set("watchdog/pid/1", "another-node 1")
    dog = watchdog.Watchdog(store, rank=0, world_size=2, report=print, before_exit=print)
    monkeypatch.setattr(dog, "_end", lambda failure: None)
    looked = threading.Event()
    looks = dog._look
    monkeypatch.setattr(dog, "_look", lambda: (looks(), looked.set()))

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds
        for _ in range(2):  # the second look began after the time passed
            looked.clear()
            assert looked.wait(60)

    try:
        for _ in range(8):
            pass_by(4)
        pass_by(3600)  # stopped for an hour, with the other rank silent for 32 s before
        assert dog.failure() is None and not dog._is_stalled(dog._main_frame())
        for _ in range(3):
            pass_by(4)
        assert dog.failure().rank == 1 and "no sign of life" in dog.failure().error
    finally:
        dog.finish()


def test_a_silent_process_of_this_node_is_only_stopped():
    store = dist.FileStore(tempfile.mkstemp()[1])
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    store.set("watchdog/pid/1", f"{process_space()} {child.pid}")
    dog = watchdog.Watchdog(store, rank=0, world_size=2, report=print, before_exit=print)
    dog._stop.set()
    child.send_signal(signal.SIGSTOP)
    for dog._now in range(0, 1000, 10):
        dog._watch_processes()
        dog._watch_neighbour()
    assert dog.failure() is None
    child.kill()
    child.wait()
    dog._watch_processes()
    assert dog.failure().rank == 1 and "ended without a word" in dog.failure().error
