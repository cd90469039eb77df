"""Checkpoints written while training goes on: the same bytes, and failures that every rank hears of."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from automodel.checkpoint import manifest, training
from automodel.checkpoint.manifest import damage
from automodel.checkpoint.retention import Retention
from automodel.checkpoint.room import expected_bytes
from automodel.checkpoint.staging import HostCopy
from automodel.checkpoint.training import Checkpointer, SaveError, TrainState, require_whole
from automodel.data.batches.collate import CausalLMCollator
from automodel.data.batches.loader import TrainLoader
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from automodel.optim.optimizers import adamw, parameter_groups
from automodel.train.step import StepConfig, train_step
from automodel.types import UserError
from tests.dist.pool import run_fresh
from tests.dist.tiny import parallel_model, tiny_llama, uneven_rows


class Training:
    """The tiny model under a strategy, a step at a time."""

    def __init__(self, strategy: str, *, is_partly_frozen: bool = False) -> None:
        model = tiny_llama()
        if is_partly_frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("layers.1" in name)
        self.model, layout, dp = parallel_model(strategy, model=model)
        self.optimizer = adamw(parameter_groups(self.model), lr=1e-2)
        layout.prepare_optimizer(self.optimizer, self.model)
        self.state = TrainState(self.model, self.optimizer)
        loader = TrainLoader(uneven_rows(48), collate=CausalLMCollator(0), global_batch_size=8, local_batch_size=2,
                             dp_rank=dp.rank, dp_size=dp.size, seed=0)  # fmt: skip
        self.batches = iter(list(loader.steps_of(0)))
        self.config = StepConfig(torch.device("cpu"), dp.group, True, 1.0, nullcontext)

    def step(self) -> None:
        train_step(
            self.model,
            next(self.batches),
            objective=as_objective(CrossEntropy()),
            optimizer=self.optimizer,
            config=self.config,
        )


def requests_heard(strategy: str) -> tuple[int, int, int]:
    """Take a step after which rank 0 wants a checkpoint and rank 1 a stop."""
    run, rank = Training(strategy), torch.distributed.get_rank()
    result = train_step(run.model, next(run.batches), objective=as_objective(CrossEntropy()), optimizer=run.optimizer,
                        config=run.config, wants_stop=rank == 1, wants_save=rank == 0)  # fmt: skip
    return result.num_stop_requests, result.num_save_requests, result.num_label_tokens


def test_ranks_that_share_their_rows_hear_of_each_others_requests_too(two_ranks):
    ((_, _, num_label_tokens), _) = two_ranks.run(requests_heard, "ddp")
    assert two_ranks.run(requests_heard, "tp2") == [(1, 1, num_label_tokens)] * 2


def threads_after_saves(folder: str) -> list[int]:
    """Return how many threads this process has after a step, and after each of two saves."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(2)  # more than one, so that OpenMP has a pool for each thread that computes
    run = Training("ddp")
    run.step()
    checkpointer = Checkpointer(Path(folder), retention=Retention())
    counts = [len(os.listdir("/proc/self/task"))]
    for number in (1, 2):
        checkpointer.save(run.state, progress={"step": number}, rng={})
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in Linux's /proc")
def test_a_save_of_one_process_leaves_no_threads_that_compete_with_the_training(tmp_path):
    ((before, *after),) = run_fresh(partial(threads_after_saves, str(tmp_path)), 1)
    assert after == [before, before]


def save_both_ways(strategy: str, folder: str, is_partly_frozen: bool) -> None:
    run = Training(strategy, is_partly_frozen=is_partly_frozen)
    run.step()
    at_once = Checkpointer(Path(folder) / "at once", retention=Retention())
    behind = Checkpointer(Path(folder) / "behind", retention=Retention(), is_async=True)
    for number in (1, 2):  # the second time into memory that is there already
        at_once.save(run.state, progress={"step": number}, rng={})
        behind.save(run.state, progress={"step": number}, rng={})
        run.step()  # changes every weight while the write goes on
        run.step()
    behind.finish(must_be_saved=True)


@pytest.mark.parametrize(
    ("strategy", "is_partly_frozen"),
    [("ddp", False), ("ddp", True), ("fsdp2", False), ("tp2", False), ("zero1", False), ("zero3", False)],
)
def test_what_is_written_behind_training_is_the_same_byte_by_byte(two_ranks, tmp_path, strategy, is_partly_frozen):
    two_ranks.run(save_both_ways, strategy, str(tmp_path), is_partly_frozen)
    for step in ("step_00000001", "step_00000002"):
        one, other = tmp_path / "at once" / step, tmp_path / "behind" / step
        assert damage(one) is None and damage(other) is None
        names = {path.name for path in one.glob("*.distcp")}
        assert len(names) == 2 and names == {path.name for path in other.glob("*.distcp")}
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert (tmp_path / "behind" / "latest").resolve().name == "step_00000002"


def fill_the_disk(folder: str, on_error: str) -> list[Any]:
    """Save step 1; then 2 on a disk that fills up during the write; then 3, with room again."""
    usage = shutil.disk_usage
    run = Training("fsdp2")
    run.step()
    checkpointer = Checkpointer(Path(folder), retention=Retention(), is_async=True, on_error=on_error)
    told = []
    filler = Path(folder) / "filler"
    for step in (1, 2, 3):
        if step == 2:
            if torch.distributed.get_rank() == 0:
                filler.write_bytes(bytes(usage(folder).free - 2**13))
            torch.distributed.barrier()
            training.shutil.disk_usage = lambda place: usage(place)._replace(free=2**30)
        try:
            checkpointer.save(run.state, progress={"step": step}, rng={})
            training.shutil.disk_usage = usage
            checkpointer._write.exception()  # wait, as a few steps do
            told.append((checkpointer.must_stop, sorted(path.name for path in Path(folder).glob("*step_*"))))
            torch.distributed.barrier()  # before room is made
        except SaveError as error:
            told.append(str(error))
        if step == 2:
            filler.unlink(missing_ok=True)
    return told


def test_a_write_that_fails_stops_every_rank_at_the_next_save(two_ranks, small_disk):
    for first, second, third in two_ranks.run(fill_the_disk, str(small_disk("3m")), "stop"):
        assert first == (False, ["step_00000001"])
        assert second == (True, ["step_00000001"])
        assert "step_00000002 could not be written: " in third and "are untouched" in third


def test_a_write_that_fails_can_be_gone_on_from(two_ranks, small_disk):
    for first, second, third in two_ranks.run(fill_the_disk, str(small_disk("3m")), "continue"):
        assert first == second == (False, ["step_00000001"])
        assert third == (False, ["step_00000001", "step_00000003"])


def save_on_a_full_host(folder: str) -> list[Any]:
    """Save step 1 while rank 1 has no memory for a copy, and 2 with memory again; return the log and the folders."""
    run, told = Training("fsdp2"), []
    run.step()
    checkpointer = Checkpointer(Path(folder), retention=Retention(), is_async=True)
    training.log.addFilter(lambda record: told.append(record.getMessage()) or True)
    make = HostCopy.make

    def fail(self: HostCopy, state: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    for step in (1, 2):
        HostCopy.make = fail if step == 1 and torch.distributed.get_rank() == 1 else make
        checkpointer.save(run.state, progress={"step": step}, rng={})
        told.append(sorted(path.name for path in Path(folder).glob("step_*")) if step == 1 else "")
    checkpointer.finish(must_be_saved=True)
    training.log.filters.clear()
    return told


def test_a_host_without_room_for_a_copy_saves_while_training_waits(two_ranks, tmp_path):
    for told in two_ranks.run(save_on_a_full_host, str(tmp_path)):
        assert ["step_00000001"] in told
        words = [each for each in told if "has no host memory" in each]
        assert words in (
            [],
            [
                "rank 1 has no host memory for a copy (RuntimeError: DefaultCPUAllocator: not enough "
                "memory: you tried to allocate 9 bytes): training waits for this checkpoint"
            ],
        )
    assert damage(tmp_path / "step_00000001") is None and damage(tmp_path / "step_00000002") is None


class OnlyOnItsDevice(torch.optim.SGD):
    """An optimizer whose kernels are made for one device."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("this optimizer needs a CUDA device")


def test_the_estimate_of_room_stops_no_run():
    model = tiny_llama()
    num_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert expected_bytes(model, lambda groups: adamw(groups, lr=1.0)) == pytest.approx(3 * num_bytes, rel=1e-3)
    assert expected_bytes(model, lambda groups: OnlyOnItsDevice(groups, lr=1.0)) == num_bytes
    assert expected_bytes(model, lambda groups: None) == num_bytes  # builds no optimizer at all


def test_the_estimate_tries_the_optimizer_where_the_weights_are():
    devices = []

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        devices.extend(parameter.device for group in groups for parameter in group["params"])
        return torch.optim.SGD(groups, lr=1.0)

    expected_bytes(tiny_llama().to("meta"), build)
    assert devices == [torch.device("meta")]


def without_room(folder: str) -> list[Any]:
    usage, run = shutil.disk_usage, Training("ddp")
    run.step()
    training.shutil.disk_usage = lambda place: usage(place)._replace(free=1000)
    told = []
    for on_error in ("stop", "continue"):
        checkpointer = Checkpointer(Path(folder), retention=Retention(), is_async=True, on_error=on_error)
        try:
            checkpointer.save(run.state, progress={"step": 1}, rng={})
            told.append("gone on")
            checkpointer.finish(must_be_saved=True)
        except SaveError as error:
            told.append(str(error))
    training.shutil.disk_usage = usage
    return told


def test_room_is_looked_for_before_a_byte_is_written(two_ranks, tmp_path):
    for stopped, gone_on, last in two_ranks.run(without_room, str(tmp_path)):
        assert "step_00000001 could not be written: it takes about 1 MiB, but only 0 MiB are free" in stopped
        assert gone_on == "gone on" and last == stopped
    assert list(tmp_path.iterdir()) == []


def save_and_clear(folder: str) -> None:
    run = Training("ddp")
    run.step()
    (Path(folder) / ".step_00000007.partial").mkdir(parents=True)
    (Path(folder) / ".step_00000007.partial" / "__0_0.distcp").write_bytes(b"left by a run that was killed")
    checkpointer = Checkpointer(Path(folder), retention=Retention(keep_last=1, keep_best="min:loss"), is_async=True)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, 1.5)):
        checkpointer.save(run.state, progress={"step": step, "metrics": {"loss": loss}}, rng={})
    checkpointer.finish()


def test_the_best_and_the_newest_stay_and_leftovers_go(one_rank, tmp_path):
    one_rank.run(save_and_clear, str(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_00000002", "step_00000005"]
    assert json.loads((tmp_path / "step_00000002" / "progress.json").read_text())["metrics"] == {"loss": 1.0}


def _flip(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    path = folder / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-5])


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGE = {
    "flipped bit": (_flip, "__0_0.distcp is damaged: its checksum differs"),
    "truncated file": (_truncate, "__1_0.distcp has "),
    "missing shard": (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "empty folder": (_empty, "no manifest.json: the save was not finished, or automodel did not write this folder"),
    "torn manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
}


def save_one(folder: str) -> None:
    run = Training("fsdp2")
    Checkpointer(Path(folder), retention=Retention()).save(run.state, progress={"step": 1}, rng={})


def sum_in_shares(folder: str) -> list[str]:
    """Check a folder and return the files that this rank read."""
    read, sum_up = [], manifest._size_and_checksum
    manifest._size_and_checksum = lambda path: (read.append(path.name), sum_up(path))[1]
    try:
        require_whole(Path(folder))
    finally:
        manifest._size_and_checksum = sum_up
    return read


def test_every_rank_checks_its_share_of_a_checkpoint(two_ranks, tmp_path):
    two_ranks.run(save_one, str(tmp_path))
    folder = tmp_path / "step_00000001"
    one, other = two_ranks.run(sum_in_shares, str(folder))
    assert one and other and sorted(one + other) == sorted(json.loads((folder / "manifest.json").read_text()))


def refusal(folder: str) -> str:
    try:
        require_whole(Path(folder))
    except UserError as error:
        return str(error)
    return "whole"


def test_damaged_checkpoints_are_refused_in_words_on_every_rank(two_ranks, tmp_path):
    two_ranks.run(save_one, str(tmp_path / "whole"))
    for number, (spoil, words) in enumerate(DAMAGE.values()):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole" / "step_00000001", folder)
        spoil(folder)
        for told in two_ranks.run(refusal, str(folder)):
            assert f"checkpoint.resume={folder}: {words}" in told
    assert two_ranks.run(refusal, str(tmp_path / "whole" / "step_00000001")) == ["whole", "whole"]
