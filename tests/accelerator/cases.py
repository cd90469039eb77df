"""What the product does on an accelerator, case by case: ``python -m tests.accelerator.cases`` prints it as JSON.

A process of its own, since the device that ``pretend`` makes cannot be taken away again.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from automodel.data.batches.collate import CausalLMCollator, PackedCollator, RowTargetCollator
from automodel.data.batches.loader import TrainLoader
from automodel.distributed import clip_gradients, rescale_gradients
from automodel.distributed.parallel.ddp import DDP
from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.distributed.parallel.strategy import data_parallel
from automodel.eval.metrics import ConfusionMatrix
from automodel.eval.validation import Validation, validate
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.linear_cross_entropy import LinearCrossEntropy
from automodel.losses.objective import as_objective
from automodel.optim.optimizers import adamw, muon, parameter_groups
from automodel.optim.schedules import constant
from automodel.train.flops import training_flops
from automodel.train.loop import Evaluator, Timeouts, TrainLoop
from automodel.train.meter import Meter
from automodel.train.step import Batch, StepConfig
from automodel.train.step_scheduler import StepScheduler
from tests.accelerator import pretend
from tests.dist.tiny import tiny_llama, uneven_rows

NUM_STEPS, MICRO_BATCHES = 3, 2


@dataclass(frozen=True)
class Case:
    """One layout, trained for three steps, the first and last of them logged, and validated."""

    strategy: DDP | FSDP2
    world_size: int
    is_packed: bool = False
    loss: CrossEntropy = LinearCrossEntropy()  # noqa: RUF009 - frozen
    optimizer: Callable[..., torch.optim.Optimizer] = adamw


CASES = {
    "fsdp2, padded": Case(FSDP2(mixed_precision="bf16", activation_checkpointing=True), 8),
    "fsdp2, packed": Case(FSDP2(mixed_precision="bf16"), 8, is_packed=True),
    "fsdp2, selective": Case(FSDP2(mixed_precision="bf16", activation_checkpointing="selective"), 8),
    "fsdp2, on the host": Case(FSDP2(mixed_precision="bf16", activation_offload=True), 8),
    "fsdp2, muon": Case(FSDP2(mixed_precision="bf16"), 8, optimizer=muon),
    "fsdp2, offloaded": Case(FSDP2(cpu_offload=True), 8),
    "fsdp2, all logits": Case(FSDP2(mixed_precision="bf16"), 8, loss=CrossEntropy()),
    "fsdp2 tp 2": Case(FSDP2(tp_size=2), 8, loss=LinearCrossEntropy(label_smoothing=0.1, z_loss=1e-4, chunk_size=4)),
    "ddp alone": Case(DDP(mixed_precision="bf16"), 1),
    "ddp": Case(DDP(mixed_precision="bf16"), 8),
    "ddp, on the host": Case(DDP(mixed_precision="bf16", activation_checkpointing=2, activation_offload=True), 1),
}


class Loader(TrainLoader):
    """Tells the watch when a step begins."""

    def __iter__(self) -> Iterator[list[Batch]]:
        for micro_batches in super().__iter__():
            watch.num_steps += 1
            yield micro_batches


def run(case: Case) -> dict[str, Any]:
    """Train by the product's own loop and return the waits and the records."""
    watch.num_steps = 0
    with pretend.job(case.world_size) as info, watch:
        mesh = case.strategy.build_mesh(info)
        dp = data_parallel(mesh)
        model = case.strategy.parallelize(on_device(tiny_llama(), info.device), dist_info=info, mesh=mesh)
        if dist.get_world_size() > 1 and isinstance(case.strategy, DDP):
            model.register_comm_hook(None, given_back)
        optimizer = case.optimizer(parameter_groups(model), lr=1e-3)
        objective = as_objective(case.loss)
        config = StepConfig(info.device, dp.group, True, 1.0, lambda: case.strategy.autocast(info.device))
        records: list[dict[str, Any]] = []
        rows = uneven_rows(NUM_STEPS * MICRO_BATCHES * dp.size)
        if case.is_packed:
            rows = [row | {"position_ids": list(range(len(row["input_ids"])))} for row in rows]
        validation = Validation("validation", [CausalLMCollator(0)(uneven_rows(2))] * 3, objective)
        loop = TrainLoop(
            model=model,
            objective=objective,
            optimizer=optimizer,
            lr_scheduler=constant(optimizer, NUM_STEPS, warmup_steps=0),
            steps=StepScheduler(NUM_STEPS, num_epochs=1, log_every_steps=3),
            loader=Loader(rows, collate=PackedCollator(0) if case.is_packed else CausalLMCollator(0),
                          global_batch_size=MICRO_BATCHES * dp.size, local_batch_size=1, dp_rank=dp.rank,
                          dp_size=dp.size, seed=0),
            step_config=config,
            evaluators=[Evaluator("validation", lambda poll: validate(
                model, validation, device=info.device, dp_group=dp.group, autocast=config.autocast, poll=poll))],
            checkpointer=None,
            sink=SimpleNamespace(log=records.append),
            meter=Meter(info.device, world_size=info.world_size, flops=training_flops(model)),
            timeouts=Timeouts(training=1, slow_phase=1),
            metrics_size=lambda: 0,
            resume_facts={},
            on_non_finite="stop",
            dump_folder=Path("never"),
        )  # fmt: skip
        watch.waits.clear()
        loop.run()
        return {"waits": [asdict(wait) for wait in watch.waits], "records": records,
                "is_fused": all(group["fused"] for group in optimizer.param_groups)}  # fmt: skip


class Classifier(nn.Module):
    """Three classes from the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(input_ids[:, :1].float()))


def classify() -> dict[str, Any]:
    """Validate a classifier over three batches and return the waits."""
    with pretend.job(1) as info, watch:
        model = on_device(Classifier(), info.device)
        batch = RowTargetCollator(0)([{"input_ids": [1, 2], "labels": 2}, {"input_ids": [3], "labels": 0}])
        validation = Validation("validation", [batch] * 3, as_objective(CrossEntropy()), ConfusionMatrix(3))
        watch.waits.clear()
        validate(model, validation, device=info.device, dp_group=dist.group.WORLD, autocast=nullcontext)
        return {"waits": [asdict(wait) for wait in watch.waits]}


def rescale_and_clip() -> dict[str, Any]:
    """Call the documented functions with a count that the host knows and return the waits."""
    with pretend.job(1) as info, watch:
        model = on_device(Classifier(), info.device)
        model(torch.ones(1, 1, device=info.device), None, False).logits.sum().backward()
        watch.waits.clear()
        rescale_gradients(model, torch.tensor(3), dist.group.WORLD)
        clip_gradients(model, 1.0)
        return {"waits": [asdict(wait) for wait in watch.waits]}


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move ``model``, once: the parameters of the device cannot be moved where they are."""
    model.to(device)
    model.to = lambda *args, **options: model
    return model


def given_back(state, bucket):  # whose annotations torch would want as types, not as text
    """Reduce nothing: DDP's own way asks for values."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def attempt(action: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Return what ``action`` does, or how it failed and what it had waited for by then."""
    try:
        return action(*args)
    except Exception:
        return {"error": traceback.format_exc(), "waits": [asdict(wait) for wait in watch.waits]}


if __name__ == "__main__":
    watch = pretend.install()
    nn.parallel.distributed._verify_param_shape_across_processes = lambda *args, **options: None
    results = {name: attempt(run, case) for name, case in CASES.items()}
    results |= {"classification": attempt(classify), "documented functions": attempt(rescale_and_clip)}
    json.dump(results, sys.stdout)
    sys.stdout.flush()
    os._exit(0)
