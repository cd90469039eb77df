"""Ranks that come together or not: who is missing is said, and a clean end never hangs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from automodel.distributed import destroy_global_state, initialize_distributed
from automodel.distributed.runtime import dist_info, rendezvous
from automodel.distributed.runtime.rendezvous import name_ranks
from tests.dist.pool import RankPool, free_port, run_fresh

SHORT = 3 / 60  # minutes


def start(minutes: float = SHORT, backend: str = "gloo") -> tuple[str, str, float]:
    """Return (kind of the error, its words, seconds) of a start-up, with the sum of the ranks where it went well."""
    begun = time.monotonic()
    try:
        initialize_distributed(backend, timeout_minutes=minutes)
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begun
    destroy_global_state()
    return "", str(total.item()), time.monotonic() - begun


def without(absent: tuple[int, ...]) -> tuple[str, str, float] | None:
    return None if int(os.environ["RANK"]) in absent else start()


def test_all_ranks_that_come_meet():
    assert [told[:2] for told in run_fresh(start, 4)] == [("", "6.0")] * 4


@pytest.mark.parametrize(("absent", "words"), [((2,), "rank 2 did not come"), ((1, 3), "ranks 1, 3 did not come")])
def test_ranks_that_never_come_are_named_on_every_rank(absent, words):
    told = [outcome for outcome in run_fresh(partial(without, absent), 4) if outcome is not None]
    assert len(told) == 4 - len(absent)
    for kind, message, seconds in told:
        assert kind == "StartError" and words in message and "within 0.05 minutes" in message
        assert seconds < 15  # not torch's half an hour


def test_a_rank_0_that_never_comes_is_named():
    (_, *told) = run_fresh(partial(without, (0,)), 3)
    for kind, message, _ in told:
        assert kind == "StartError" and "rank 0 did not come within 0.05 minutes" in message


def test_a_port_in_use_is_told_at_once():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told = run_fresh(start, 2, {"MASTER_PORT": port})
    assert told[0][0] == "UserError" and f"MASTER_PORT={port} is in use" in told[0][1]
    assert told[1][0] == "StartError" and "answers, but not as the store of a job" in told[1][1]


def test_a_name_that_nobody_knows_is_told():
    for kind, message, _ in run_fresh(partial(start, 1), 2, {"MASTER_ADDR": "no-such-node.invalid"}):
        assert kind == "UserError" and "MASTER_ADDR=no-such-node.invalid is not known" in message


def test_an_address_that_is_not_rank_0s_node_is_told():
    told = run_fresh(partial(start, 0.2), 1, {"MASTER_ADDR": "192.0.2.1", "WORLD_SIZE": "2"})
    assert told[0][0] == "UserError" and "cannot reach itself at MASTER_ADDR=192.0.2.1" in told[0][1]


def start_impatiently() -> tuple[str, str, float]:
    rendezvous.ASTRAY_SEC = 1.0
    return start()


def test_a_name_that_means_the_machine_itself_is_reported_on_another_node():
    env = {"MASTER_ADDR": "2130706433", "WORLD_SIZE": "2", "RANK": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1"}
    kind, message, _ = run_fresh(start_impatiently, 1, env)[0]
    assert kind == "UserError" and "MASTER_ADDR=2130706433 means" in message and "rank 0 on node 0" in message


def more_ranks_than_devices(monkeypatched: None = None) -> tuple[str, str, float]:
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda: torch.device("cuda")
    torch.accelerator.device_count = lambda: 1
    dist.is_nccl_available = lambda: True
    return start(backend="auto")


def test_more_local_ranks_than_devices_are_told():
    told = run_fresh(more_ranks_than_devices, 2)
    assert "local rank 1 has no cuda device: this node shows 1; start at most 1 processes a node" in told[1][1]


def start_again() -> list[tuple[str, str]]:
    return [start(1)[:2] for _ in range(3)]


def test_a_job_can_start_and_end_several_times_at_one_address():
    assert run_fresh(start_again, 2) == [[("", "1.0")] * 3] * 2


def by_other_ways(folder: Path) -> list[tuple]:
    facts = []
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    for way in (
        {"init_method": f"file://{folder}/url", "rank": rank, "world_size": size},
        {"init_method": f"file://{folder}/full?rank={rank}&world_size={size}"},
        {"store": dist.FileStore(f"{folder}/store", size), "rank": rank, "world_size": size},
    ):
        dist.init_process_group("gloo", **way)
        info = initialize_distributed("auto")
        facts.append((info.rank, info.world_size, info.backend))
        dist.barrier()
        destroy_global_state()
    return facts


def test_a_group_made_by_torch_from_a_url_or_a_store_is_used(tmp_path):
    assert run_fresh(partial(by_other_ways, tmp_path), 2) == [[(rank, 2, "gloo")] * 3 for rank in range(2)]


def load_by_plan(stories: Path) -> tuple:
    from transformers import AutoModelForCausalLM

    info = initialize_distributed("auto", timeout_minutes=1)
    group = dist.group.WORLD
    model = AutoModelForCausalLM.from_pretrained(stories, tp_plan="auto", dtype=torch.float32)
    logits = model(torch.arange(8)[None]).logits
    is_ours = dist.group.WORLD is group and initialize_distributed("auto") == info
    is_split = any("DTensor" in type(parameter).__name__ for parameter in model.parameters()) or any(
        parameter.numel() != full.numel()
        for parameter, full in zip(
            model.parameters(), AutoModelForCausalLM.from_pretrained(stories).parameters(), strict=True
        )
    )
    return is_ours, is_split, logits.detach().sum().item()


def test_transformers_own_tensor_parallelism_finds_our_group(stories):
    told = run_fresh(partial(load_by_plan, stories), 2)
    assert [one[:2] for one in told] == [(True, True)] * 2
    assert told[0][2] == pytest.approx(told[1][2], rel=1e-5)


def lose_a_peer(victim: int) -> tuple[float, bool] | None:
    initialize_distributed("gloo", timeout_minutes=1)
    dist.barrier()
    if dist.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    begun = time.monotonic()
    destroy_global_state()
    destroy_global_state()
    return time.monotonic() - begun, dist.is_initialized()


@pytest.mark.parametrize("victim", [0, 1])
def test_leaving_never_waits_for_a_peer_that_is_gone(victim):
    for told in run_fresh(partial(lose_a_peer, victim), 3):
        assert told is None or (told[0] < 2 * dist_info.DESTROY_SEC and not told[1])


def hang_at_the_end() -> tuple[bool, str]:
    initialize_distributed("gloo")
    dist_info.DESTROY_SEC = 1.0
    forever = threading.Event()
    dist.destroy_process_group = forever.wait
    begun = time.monotonic()
    destroy_global_state()
    is_soon = time.monotonic() - begun < 5
    destroy_global_state()
    return is_soon, time.monotonic() - begun < 10


def test_leaving_is_not_held_up_by_what_hangs():
    assert run_fresh(hang_at_the_end, 1) == [(True, True)]


def hold_buffer(on_destroy: Callable[[], object]) -> types.ModuleType:
    """Return a module that holds a buffer as DeepEP's users do."""

    class Buffer:
        explicitly_destroy = True

        def destroy(self) -> None:
            on_destroy()

    Buffer.__module__ = "deep_ep.buffer"
    holder = types.ModuleType("somebodys_dispatcher")
    holder._buffer = Buffer()
    sys.modules["deep_ep"], sys.modules["somebodys_dispatcher"] = types.ModuleType("deep_ep"), holder
    return holder


def leave_with_a_buffer() -> tuple:
    log: list[str] = []
    initialize_distributed("gloo")
    holder = hold_buffer(lambda: (log.append(f"buffer, group {dist.is_initialized()}"), 1 / 0))
    destroy_global_state()
    destroy_global_state()
    return log, holder._buffer, dist.is_initialized()


def test_buffers_go_before_the_group_and_a_failure_there_stops_nothing():
    assert run_fresh(leave_with_a_buffer, 1) == [(["buffer, group True"], None, False)]


def interrupt_while_leaving() -> tuple:
    heard: list[int] = []
    handler = lambda number, frame: heard.append(number)  # noqa: E731
    signal.signal(signal.SIGINT, handler)
    initialize_distributed("gloo")
    done: list[str] = []
    hold_buffer(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.1), done.append("whole")))
    destroy_global_state()
    is_back = signal.getsignal(signal.SIGINT) is handler
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    return done, is_back, heard


def test_an_interrupt_does_not_cut_the_end_and_the_callers_handler_is_put_back():
    assert run_fresh(interrupt_while_leaving, 1) == [(["whole"], True, [signal.SIGINT])]


def leave_from_a_thread() -> bool:
    initialize_distributed("gloo")
    thread = threading.Thread(target=destroy_global_state)
    thread.start()
    thread.join(30)
    return dist.is_initialized()


def test_any_thread_can_leave():
    assert run_fresh(leave_from_a_thread, 1) == [False]


def interrupt_the_wait() -> str:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        return str(start(minutes=1))
    except KeyboardInterrupt:
        return "interrupted"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ctrl_c_ends_the_wait_for_the_others(rank):
    env = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_PORT": str(free_port())}
    begun = time.monotonic()
    assert run_fresh(interrupt_the_wait, 1, env) == ["interrupted"]
    assert time.monotonic() - begun < 20


@pytest.fixture(scope="module")
def made_elsewhere() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def take_what_is_there(backend: str) -> tuple:
    info = initialize_distributed(backend)
    return info.backend, info.device, info.rank


def test_a_group_made_elsewhere_is_reported_as_it_is(made_elsewhere):
    expected = [("gloo", torch.device("cpu"), rank) for rank in range(2)]
    assert made_elsewhere.run(take_what_is_there, "nccl") == expected  # what was asked for is not what is in use


def test_many_missing_ranks_are_told_briefly():
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([0, 1, 5, 6, 7, 8]) == "ranks 0, 1, 5-8"
    assert len(name_ranks(range(0, 2000, 2))) < 100


def fall_behind() -> tuple[bool, bool]:
    info = initialize_distributed("gloo", timeout_minutes=1)
    from automodel.distributed.runtime.agreement import set_collective_timeout

    set_collective_timeout(2 / 60)
    if info.rank == 1:
        time.sleep(6)
        return True, True
    begun = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError:
        return True, timedelta(seconds=time.monotonic() - begun) < timedelta(seconds=6)
    return False, False


def test_the_short_time_out_counts_once_it_is_set():
    assert run_fresh(fall_behind, 2) == [(True, True)] * 2
