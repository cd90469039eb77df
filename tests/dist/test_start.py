"""Start-up, and errors that every rank must hear of."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from automodel.distributed import destroy_global_state, get_local_rank_preinit, get_rank_safe, initialize_distributed
from automodel.distributed.runtime.agreement import PeerError, run_on_all_ranks, run_on_main
from automodel.types import UserError


def info_of_a_group_that_exists() -> tuple:
    info = initialize_distributed("auto")
    return info.backend, info.rank, info.world_size, info.device, info.is_main


def test_the_facts_of_a_group_that_already_exists(two_ranks):
    cpu = torch.device("cpu")
    assert two_ranks.run(info_of_a_group_that_exists) == [("gloo", 0, 2, cpu, True), ("gloo", 1, 2, cpu, False)]


def start_alone() -> tuple:
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    handler = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGINT, handler)
    first, second = initialize_distributed("auto"), initialize_distributed("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    destroy_global_state()
    destroy_global_state()
    return first == second, first.world_size, first.backend, total.item(), signal.getsignal(signal.SIGINT) is handler


def test_a_single_process_needs_no_environment_and_starts_and_ends_twice():
    from tests.dist.pool import RankPool

    pool = RankPool(1)
    assert pool.run(start_alone) == [(True, 1, "gloo", 1.0, True)]
    pool.close()


def test_ranks_come_from_the_environment_before_a_group_exists(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert get_rank_safe() == 0  # a batch script, no step
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert (get_rank_safe(), get_local_rank_preinit()) == (5, 1)
    monkeypatch.setenv("RANK", "3")
    assert get_rank_safe() == 3
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="RANK='x' in the environment is not a whole number"):
        get_rank_safe()


def test_a_backend_without_its_device_is_told(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(UserError, match="nccl needs a CUDA device"):
        initialize_distributed("nccl")


def ask_main(kind: str) -> tuple[object, str]:
    def act() -> int:
        if kind == "user":
            raise UserError("one", "two")
        if kind == "unpicklable":
            raise ValueError("with a lambda", lambda: None)
        return 7

    try:
        return run_on_main(act), ""
    except Exception as error:
        return type(error), str(error)


def test_what_rank_0_does_reaches_all(two_ranks):
    assert two_ranks.run(ask_main, "fine") == [(7, ""), (7, "")]


def test_what_rank_0_fails_at_reaches_all(two_ranks):
    assert two_ranks.run(ask_main, "user") == [(UserError, "one\ntwo")] * 2
    first, second = two_ranks.run(ask_main, "unpicklable")
    assert first[0] is ValueError and second[0] is PeerError and "with a lambda" in second[1]


def fail_on_last_rank(kind: type[Exception]) -> tuple[object, str]:
    def act() -> int:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise kind("only here")
        return dist.get_rank()

    try:
        return run_on_all_ranks(act), ""
    except Exception as error:
        return type(error), str(error)


def test_what_one_rank_fails_at_reaches_all(two_ranks):
    assert two_ranks.run(fail_on_last_rank, UserError) == [(UserError, "only here")] * 2
    first, second = two_ranks.run(fail_on_last_rank, KeyError)
    assert first[0] is PeerError and "rank 1 failed: KeyError('only here')" in first[1]
    assert second[0] is KeyError
