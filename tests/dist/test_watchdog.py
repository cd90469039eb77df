"""What the watchdog says of a stall, and whom it takes for dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from automodel.distributed import watchdog
from automodel.distributed.watchdog import Report, late_ranks, set_stall_limit, stall_message
from tests.dist.pool import RankPool


def report(rank: int, *, is_waiting: bool, place: str = "training, step 7") -> Report:
    stack = "  all_reduce\n" if is_waiting else "  time.sleep\n"
    return Report(rank, f"node-{rank // 2}", 100 + rank, place, is_waiting, 540 if is_waiting else 541, stack)


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
    reports = [report(0, is_waiting=True, place="evaluating, step 7"), report(1, is_waiting=True)]
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
    while watchdog._is_alive(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not watchdog._is_alive(child.pid)  # a zombie: nobody has waited for it
    child.wait()
    assert not watchdog._is_alive(child.pid) and watchdog._is_alive(os.getpid())


def first_failure_wins() -> tuple[str, int, bool]:
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    dog = watchdog.Watchdog(store, rank=rank, world_size=2, tell=print, before_exit=lambda failure: None)
    assert dog.failure() is None
    dist.barrier()
    if rank == 1:
        dog.fail("ValueError: first")
    dist.barrier()
    told = dog.fail("RuntimeError: an echo")
    dog.leave()
    return told.error, told.rank, dog.failure() == told


def test_the_failure_told_first_is_everybodys():
    pool = RankPool(2)
    assert pool.run(first_failure_wins) == [("ValueError: first", 1, True)] * 2
    pool.close()
