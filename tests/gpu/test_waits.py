"""What only a device shows about waiting: kernels that look at a flag, copies that are still under way, contexts."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from automodel.data.batches.collate import CausalLMCollator
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from automodel.optim.optimizers import adamw, parameter_groups
from automodel.train.step import StepConfig, train_step
from tests.dist.tiny import tiny_llama, uneven_rows
from tests.recipes.command import command_line as run
from tests.recipes.command import records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
SHORT = ["evaluation=loss", "validation_dataset.limit=16", "dataset.limit=64", "step_scheduler.max_steps=4",
         "step_scheduler.log_every_steps=1"]  # fmt: skip


@pytest.fixture
def group():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_torch_itself_sees_no_wait_in_a_step(group):
    device = torch.device("cuda", torch.cuda.current_device())
    model = tiny_llama().to(device).train()
    optimizer = adamw(parameter_groups(model), lr=1e-3)
    config = StepConfig(device, group, True, 1.0, nullcontext)
    batches = [CausalLMCollator(0)([row]).pin_memory() for row in uneven_rows(2)]
    options = {"objective": as_objective(CrossEntropy()), "optimizer": optimizer, "config": config}
    train_step(model, batches, **options)  # which makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = train_step(model, batches, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not result.is_bad.read() and result.loss_sum.item() > 0


@pytest.mark.parametrize("options", [["distributed=ddp"], ["distributed=fsdp2", "distributed.cpu_offload=true"]])
def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path: Path, options: list[str]):
    # The third micro-batch is bad, and every step has one: the first two steps train, the third must not.
    common = [*SHORT, *options, "loss_fn._target_=tests.recipes.faulty_losses.NanAtThirdCall", "on_non_finite=skip",
              "step_scheduler.global_batch_size=8", "step_scheduler.local_batch_size=8", "lr_scheduler=constant",
              "evaluation=loss", "step_scheduler.val_every_steps=1"]  # fmt: skip
    run(*common, f"output_dir={tmp_path}/run")
    losses = {record["step"]: record["loss"] for record in records(tmp_path / "run", "validation")}
    assert losses[3] == losses[2] and losses[2] != losses[1] and losses[4] != losses[3]


def test_gloo_on_a_machine_with_a_device_opens_no_context_there(tmp_path: Path):
    run(*SHORT, "dist_env.backend=gloo", "loss_fn._target_=tests.recipes.noting_loss.WithoutCuda",
        "step_scheduler.ckpt_every_steps=1", f"output_dir={tmp_path}/run")  # fmt: skip
    assert json.loads((tmp_path / "run" / "run.json").read_text())["device"] == "cpu"


def test_the_utilisation_of_a_known_device_is_a_share(tmp_path: Path):
    from automodel.train.flops import peak_flops_per_sec

    run(*SHORT, f"output_dir={tmp_path}/run")
    is_known = peak_flops_per_sec(torch.cuda.get_device_name()) is not None
    for record in records(tmp_path / "run"):
        assert (0 < record["mfu"] < 1) if is_known else record["mfu"] is None
