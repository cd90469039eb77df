"""One rank of every node goes first, in groups, jobs and blocks of any kind."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from automodel.distributed import initialize_distributed
from automodel.distributed.runtime.first_rank import FirstRankPerNode, barrier_and_log
from automodel.distributed.runtime.side_group import _barrier_with_timeout, _create_gloo_group
from automodel.types import UserError
from tests.dist.nodes import LONG, PLACES, note, num_groups, outcome, placed, two_nodes
from tests.dist.pool import run_fresh


def pass_through(log: Path, is_numbered: bool) -> tuple[bool, int]:
    rank = dist.get_rank()
    with two_nodes(is_numbered=is_numbered), FirstRankPerNode(timeout=LONG) as is_first:
        note(log, f"{rank} begins")
        time.sleep(0.5 if rank == 2 else 0.05)
        note(log, f"{rank} ends")
    note(log, f"{rank} leaves")
    return is_first, num_groups()


@pytest.mark.parametrize("is_numbered", [True, False], ids=["group_rank", "local_ranks_alone"])
def test_the_first_rank_of_every_node_ends_before_any_other_begins(four_ranks, tmp_path, is_numbered):
    log = tmp_path / "log"
    results = four_ranks.run(pass_through, log, is_numbered)
    assert results == [(True, 1), (False, 1), (True, 1), (False, 1)]  # and no group is left behind
    lines = log.read_text().splitlines()
    assert set(lines[:4]) == {"0 begins", "0 ends", "2 begins", "2 ends"}
    assert set(lines[4:8]) == {"1 begins", "1 ends", "3 begins", "3 ends"}
    assert set(lines[8:]) == {f"{rank} leaves" for rank in range(4)}


def is_first_at(places: list[dict[str, int]]) -> bool:
    with placed(**places[dist.get_rank()]), FirstRankPerNode(timeout=LONG) as is_first:
        return is_first


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([{"GROUP_RANK": r % 2, "LOCAL_RANK": r // 2} for r in range(4)], [True, True, False, False]),
        ([{"GROUP_RANK": 0, "LOCAL_RANK": 3 - r} for r in range(4)], [False, False, False, True]),
        ([{"GROUP_RANK": 0} for r in range(4)], [True, False, False, False]),
        (
            [{"SLURM_NODEID": r % 2, "SLURM_LOCALID": r // 2, "SLURM_STEP_ID": 0} for r in range(4)],
            [True, True, False, False],
        ),
        ([{"SLURM_NODEID": 0, "LOCAL_RANK": r % 2} for r in range(4)], [True, False, True, False]),
    ],
    ids=["ranks_spread_over_nodes", "lowest_local_rank", "no_local_ranks", "slurm_step", "slurm_batch_script"],
)
def test_the_environment_tells_the_node_and_the_first_rank_on_it(four_ranks, places, expected):
    assert four_ranks.run(is_first_at, places) == expected


def decorated(log: Path) -> list[int]:
    rank = dist.get_rank()

    @FirstRankPerNode(timeout=LONG)
    def load(number: int) -> int:
        note(log, f"{rank} loads {number}")
        time.sleep(0.3 if rank == 0 else 0)
        note(log, f"{rank} has loaded {number}")
        return 10 * number + rank

    with two_nodes():
        return [load(1), load(2)]


def test_a_decorated_function_can_be_called_several_times(two_ranks, tmp_path):
    assert two_ranks.run(decorated, tmp_path / "log") == [[10, 20], [11, 21]]
    turns = [f"{rank} {verb} {number}" for number in (1, 2) for rank in (0, 1) for verb in ("loads", "has loaded")]
    assert (tmp_path / "log").read_text().splitlines() == turns


def enter_twice() -> tuple[bool, bool]:
    with two_nodes(), FirstRankPerNode(timeout=LONG) as outer, FirstRankPerNode(timeout=LONG) as inner:
        return outer, inner


def test_a_block_inside_a_block_waits_for_nobody(two_ranks):
    assert two_ranks.run(enter_twice) == [(True, True), (False, False)]


def within_a_group(log: Path) -> tuple[bool | None, bool | None]:
    rank, seen = dist.get_rank(), []
    extra = _create_gloo_group(LONG, [rank]) if rank == 1 else None  # members may have unequal numbers of groups
    group = dist.new_group([1, 2, 3], backend="gloo")
    for number in range(2):
        if rank == 0:
            seen.append(None)
            continue
        with two_nodes(is_numbered=number == 0), FirstRankPerNode(group=group, timeout=LONG) as is_first:
            note(log, f"{rank} begins")
            time.sleep(0.2 if is_first else 0)
            note(log, f"{rank} ends")
        seen.append(is_first)
    dist.barrier()
    for made in (group, extra):
        if isinstance(made, dist.ProcessGroup):
            dist.destroy_process_group(made)
    return tuple(seen)


def test_a_group_takes_turns_while_other_ranks_do_something_else(four_ranks, tmp_path):
    assert four_ranks.run(within_a_group, tmp_path / "log") == [
        (None, None),
        (True, True),
        (True, True),
        (False, False),
    ]
    lines = (tmp_path / "log").read_text().splitlines()
    for turn in (lines[:6], lines[6:]):
        assert set(turn[:4]) == {"1 begins", "1 ends", "2 begins", "2 ends"} and turn[4:] == ["3 begins", "3 ends"]


def enter_a_foreign_group() -> tuple[str, str]:
    group = dist.new_group([0], backend="gloo")
    if dist.get_rank() == 0:
        dist.destroy_process_group(group)
        return "", ""
    return outcome(lambda: FirstRankPerNode(group=group).__enter__())


def test_a_rank_outside_the_group_may_not_enter(two_ranks):
    assert two_ranks.run(enter_a_foreign_group)[1] == (
        "ValueError",
        "rank 1 is not in the given group; only the group's ranks may enter",
    )


def make_groups() -> tuple[int, str, bool]:
    group = _create_gloo_group(timedelta(seconds=1))
    started, kind = time.monotonic(), ""
    if dist.get_rank() == 0:
        kind, _ = outcome(lambda: dist.recv(torch.zeros(1), src=1, group=group))
    seconds = time.monotonic() - started
    dist.barrier()
    dist.destroy_process_group(group)
    for _ in range(5):  # the same ranks again and again, at once
        again = _create_gloo_group(LONG, [1, 0])
        total = torch.ones(1)
        dist.all_reduce(total, group=again)
        dist.destroy_process_group(again)
    return int(total), kind, seconds < 20


def test_a_gloo_group_has_its_own_time_out(two_ranks):
    assert two_ranks.run(make_groups) == [(2, "RuntimeError", True), (2, "", True)]


def barrier(absent: int | None, in_a_group: bool) -> tuple[bool, bool, bool]:
    group = _create_gloo_group(timedelta(minutes=10)) if in_a_group else None
    timeout = timedelta(seconds=1) if absent is not None else LONG
    if absent == dist.get_rank():
        time.sleep(3)  # the store of these tests, a file, counts whole seconds
    started = time.monotonic()
    came = _barrier_with_timeout(timeout, group)
    seconds = time.monotonic() - started
    in_time = seconds < 20 and (came or absent == dist.get_rank() or seconds > 0.9)
    again = _barrier_with_timeout(LONG, group)  # a failed one leaves everything usable
    if group is not None:
        dist.barrier(group)
        dist.destroy_process_group(group)
    return came, in_time, again


@pytest.mark.parametrize(
    ("world_size", "absent", "in_a_group"),
    [
        (1, None, False),
        (2, None, False),
        (4, None, True),
        (2, 0, True),
        (2, 1, False),
        (4, 0, False),
        (4, 2, True),
    ],
)
def test_a_barrier_tells_all_ranks_whether_all_came_in_time(ranks, world_size, absent, in_a_group):
    results = ranks[world_size].run(barrier, absent, in_a_group)
    assert results == [(absent is None, True, True)] * world_size


def log_lines() -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("automodel")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    started = time.monotonic()
    time.sleep(0.5 if dist.get_rank() == 1 else 0)
    barrier_and_log("all are here")
    waited = time.monotonic() - started
    logger.removeHandler(handler)
    return [*lines, str(waited > 0.4)]


def test_a_line_is_logged_once_after_all_ranks_came(two_ranks):
    assert two_ranks.run(log_lines) == [["all are here", "True"], ["True"]]


@pytest.fixture
def no_job(monkeypatch):
    for name in (*PLACES, "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_goes_first_and_waits_for_nobody(no_job, caplog):
    assert not FirstRankPerNode()._try_bootstrap_pg()
    assert _create_gloo_group() is None
    assert _barrier_with_timeout(timedelta(seconds=1))
    with FirstRankPerNode() as is_first:
        assert is_first and not dist.is_initialized()
    with pytest.raises(ValueError, match="mine"), FirstRankPerNode():
        raise ValueError("mine")
    with caplog.at_level(logging.INFO, "automodel"):
        barrier_and_log("alone")
    assert [record.message for record in caplog.records] == ["alone"]


def bootstrap() -> tuple:
    firsts, existed = [], []
    for _ in range(3):
        with FirstRankPerNode(timeout=LONG) as is_first:
            firsts.append(is_first)
            existed.append((dist.get_world_size(), dist.get_backend()))
        assert not dist.is_initialized()
    told = outcome(fail_first)
    assert not dist.is_initialized()
    info = initialize_distributed("gloo")  # the job's own start-up still finds its address free
    total = torch.ones(1)
    dist.all_reduce(total)
    return firsts, set(existed), told[0], info.world_size, total.item()


def fail_first() -> None:
    with FirstRankPerNode(timeout=LONG) as is_first:
        if is_first:
            raise UserError("not this way")


def test_the_environment_alone_is_enough():
    first, other = [([flag] * 3, {(4, "gloo")}, "UserError", 4, 4.0) for flag in (True, False)]
    assert run_fresh(bootstrap, 4) == [first, other, first, other]
