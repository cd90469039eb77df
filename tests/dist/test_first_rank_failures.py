"""Whatever happens to one rank in a FirstRankPerNode block, every rank hears of it, and none waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from automodel.distributed import initialize_distributed
from automodel.distributed.runtime.agreement import PeerError
from automodel.distributed.runtime.first_rank import FirstRankPerNode
from automodel.distributed.runtime.watchdog import start_watchdog
from automodel.types import UserError
from tests.dist.nodes import LONG, num_groups, outcome, two_nodes
from tests.dist.pool import RankPool, free_port, run_fresh

ERRORS = {"value": ValueError, "user": UserError, "interrupt": KeyboardInterrupt, "exit": SystemExit}


def fail_inside(failing: int, kind: str) -> tuple[bool, tuple[str, str], int]:
    rank, ran = dist.get_rank(), []

    def block() -> None:
        with two_nodes(), FirstRankPerNode(timeout=LONG):
            ran.append(rank)
            if rank == failing:
                raise ERRORS[kind]("the disk is full")

    told = outcome(block)
    dist.barrier()  # nobody stayed behind, and the job's own group still works
    return bool(ran), told, num_groups()


@pytest.mark.parametrize(
    ("failing", "ran"),
    [
        (0, [True, False, True, False]),
        (2, [True, False, True, False]),
        (1, [True, True, True, True]),
        (3, [True, True, True, True]),
    ],
)
def test_an_error_reaches_every_rank(four_ranks, failing, ran):
    results = four_ranks.run(fail_inside, failing, "value")
    assert [result[0] for result in results] == ran
    own = ("ValueError", "the disk is full")
    others = ("PeerError", f"rank {failing} failed: ValueError('the disk is full')")
    assert [result[1] for result in results] == [own if rank == failing else others for rank in range(4)]
    assert [result[2] for result in results] == [1] * 4


@pytest.mark.parametrize("failing", [2, 3])
def test_what_is_wrong_with_the_input_stays_a_user_error(four_ranks, failing):
    results = four_ranks.run(fail_inside, failing, "user")
    assert [told for _, told, _ in results] == [("UserError", "the disk is full")] * 4


@pytest.mark.parametrize(("kind", "name"), [("interrupt", "KeyboardInterrupt"), ("exit", "SystemExit")])
def test_an_interrupted_rank_ends_the_others(four_ranks, kind, name):
    told = [result[1] for result in four_ranks.run(fail_inside, 2, kind)]
    assert told[2] == (name, "the disk is full")
    assert told[0] == told[1] == told[3] == ("PeerError", f"rank 2 failed: {name}('the disk is full')")


class Awkward(Exception):
    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} and {right} do not fit")


def fail_awkwardly() -> tuple[str, str]:
    def block() -> None:
        with two_nodes(), FirstRankPerNode(timeout=LONG):
            raise Awkward(1, 2)

    return outcome(block)


def test_an_error_that_cannot_be_pickled_is_told_in_words(two_ranks):
    own, told = two_ranks.run(fail_awkwardly)
    assert own == ("Awkward", "1 and 2 do not fit")
    assert told[0] == "PeerError" and "Awkward: 1 and 2 do not fit" in told[1]


def dawdle(timeout: timedelta | None) -> tuple[bool, tuple[str, str]]:
    rank, ran = dist.get_rank(), []

    def block() -> None:
        short = timedelta(seconds=1)
        cm = FirstRankPerNode(timeout=short) if timeout is None else FirstRankPerNode()
        with two_nodes():
            _ = cm.__enter__() if timeout is None else cm.__enter__(timeout)
            ran.append(rank)
            time.sleep(3 if rank == 2 else 0)
            cm.__exit__(None, None, None)

    told = outcome(block)
    dist.barrier()
    return bool(ran), told


@pytest.mark.parametrize("timeout", [None, timedelta(seconds=1)], ids=["constructor", "enter"])
def test_waiting_too_long_is_an_error_and_the_block_does_not_run(four_ranks, timeout):
    results = four_ranks.run(dawdle, timeout)
    assert [ran for ran, _ in results] == [True, False, True, False]
    for kind, words in (told for _, told in results):
        assert kind == "TimeoutError"
        assert "waited 1 s for the first rank" in words and words.endswith("not there yet: rank 2")


def stay_away(timeout: timedelta) -> tuple[tuple[str, str], float]:
    if dist.get_rank() == 3:
        return ("", ""), 0.0
    started = time.monotonic()
    told = outcome(lambda: FirstRankPerNode(timeout=timeout).__enter__())
    return told, time.monotonic() - started


def test_a_rank_that_never_comes_is_named(own_four_ranks):
    *results, _ = own_four_ranks.run(stay_away, timedelta(seconds=2))
    for (kind, words), seconds in results:
        assert kind == "TimeoutError" and "waited 2 s for all ranks to come; not there yet: rank 3" in words
        assert seconds < 20


@pytest.fixture
def own_four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


def bootstrap_without_the_last() -> tuple[str, str]:
    if os.environ["RANK"] == "2":
        return "", ""
    return outcome(lambda: FirstRankPerNode(timeout=timedelta(seconds=3)).__enter__())


def test_a_job_that_does_not_meet_is_an_error():
    *told, _ = run_fresh(bootstrap_without_the_last, 3)
    for kind, words in told:
        assert kind == "TimeoutError" and "rank 2 did not come" in words


def lose(victim: int, in_its_block: bool, folder: Path) -> tuple[str, str]:
    rank, all_came = int(os.environ["RANK"]), folder.with_suffix(".came")

    def die_while_waiting() -> None:
        while not all_came.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim and not in_its_block:
        threading.Thread(target=die_while_waiting, daemon=True).start()
    try:
        with FirstRankPerNode(timeout=LONG) as is_first:
            all_came.touch()
            if rank == victim and in_its_block:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep((0.5 if in_its_block else 2) if is_first else 0)
    except (PeerError, TimeoutError) as error:
        (folder / str(rank)).touch()
        while len(list(folder.iterdir())) < 3:  # the others hear of it although this rank keeps the error, and lives
            time.sleep(0.05)
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(("victim", "in_its_block"), [(0, True), (2, True), (3, True), (1, False)])
def test_a_killed_rank_leaves_nobody_behind(tmp_path, victim, in_its_block):
    results = run_fresh(partial(lose, victim, in_its_block, tmp_path), 4)
    assert results.pop(victim) is None
    for kind, words in results:
        assert kind == "PeerError" and "ended or lost its connection" in words


def wait_under_a_watchdog() -> bool:
    info = initialize_distributed("gloo")
    watching = start_watchdog(info, 2 / 60, report=print, before_exit=print)
    with FirstRankPerNode(timeout=LONG) as is_first:
        time.sleep(4 if is_first else 0)
        failure = watching.failure()
    watching.finish()
    return failure is None


def test_a_long_wait_is_no_stall():
    assert run_fresh(wait_under_a_watchdog, 2) == [True, True]


UNHANDLED = """
import os
import torch, torch.distributed as dist
from automodel.distributed import FirstRankPerNode, initialize_distributed
initialize_distributed("gloo", timeout_minutes=60)
group = dist.new_group([1])
if os.environ["RANK"] == "0":
    dist.all_reduce(torch.ones(1))
with FirstRankPerNode(group=group):
    raise ValueError("nobody handles this")
"""


def test_an_error_that_nobody_handles_ends_the_ranks_outside_of_the_block_too():
    job = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen([sys.executable, "-c", UNHANDLED], env=job | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    outside, inside = (process.communicate(timeout=90)[1] for process in ranks)
    assert [process.returncode for process in ranks] == [1, 1]
    assert "ValueError: nobody handles this" in inside and "ValueError" not in outside
