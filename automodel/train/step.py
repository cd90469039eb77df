"""One optimizer step: a function of its set of rows alone, however they are split over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from automodel.distributed.parallel.gradients import (
    clip_coefficient,
    mean_scale,
    num_ranks_averaged,
    scale_gradients_,
    total_grad_norm,
    zero_gradients,
)
from automodel.distributed.parallel.handle import find_wrapper
from automodel.distributed.parallel.reduce import sum_losses
from automodel.distributed.parallel.sync import get_sync_ctx
from automodel.distributed.runtime.waits import to_host, wait_for, wait_for_event
from automodel.train.rng import rng_state, set_rng_state
from automodel.types import IGNORE_INDEX

Batch = dict[str, torch.Tensor]
LossFn = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class StepConfig:
    """What stays the same from step to step.

    Attributes:
        dp_group: the ranks that share the rows of a step, and over which the wrapper averages gradients.
        clip_norm: largest global gradient norm, or None.
        autocast: makes the context of a forward.
    """

    device: torch.device
    dp_group: dist.ProcessGroup
    defer_grad_sync: bool
    clip_norm: float | None
    autocast: Callable[[], AbstractContextManager]


class DeferredFlag:
    """A flag computed on the device that the host may read later without waiting for work enqueued since."""

    def __init__(self, flag: torch.Tensor) -> None:
        self._value, self._event = flag, None
        if flag.device.type not in ("cpu", "mps"):  # mps has no memory to copy to without waiting
            self._value = torch.empty((), dtype=flag.dtype, pin_memory=True)
            self._value.copy_(flag, non_blocking=True)
            self._event = torch.get_device_module(flag.device).Event()
            self._event.record()

    def read(self) -> bool:
        """Wait until the flag is there, and return it."""
        if self._event is not None:
            wait_for_event(self._event)
        return bool(to_host(self._value))


@dataclass(frozen=True)
class StepResult:
    """What a step gave, global over all ranks; ``loss_sum`` and ``grad_norm`` stay on the device.

    Attributes:
        grad_norm: of the gradient of the mean loss, before clipping.
        is_bad: whether the loss or the norm was not finite, so that no weight changed.
        sum_squared_lengths: of the documents, packed or padded; the padded tail of a pack counts as one.
        num_stop_requests: ranks that asked to stop after this step.
        num_save_requests: ranks that asked for a checkpoint after this step.
    """

    loss_sum: torch.Tensor
    grad_norm: torch.Tensor
    is_bad: DeferredFlag
    num_label_tokens: int
    num_tokens: int
    sum_squared_lengths: int
    num_stop_requests: int
    num_save_requests: int


def train_step(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    *,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    config: StepConfig,
    wants_stop: bool = False,
    wants_save: bool = False,
) -> StepResult:
    """Take one optimizer step over ``micro_batches``; every rank must call it with as many of them.

    The model's gradients become those of (global loss sum / global number of supervised tokens), whatever
    averaging the wrapper did, then are clipped. A step without any supervised token, or whose loss or norm is
    not finite, changes no weight on any rank.
    """
    # On the host, where gloo sums them over the ranks while the backward runs: the device is never waited for.
    # Over all ranks, also those of a tensor-parallel group, which count the same rows: they must all stop or save.
    counts = torch.tensor([*_count_tokens(micro_batches), int(wants_stop), int(wants_save)], dtype=torch.int64)
    counts_ready = dist.all_reduce(counts, async_op=True)

    losses = []
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        batch = {name: tensor.to(config.device, non_blocking=True) for name, tensor in batch.items()}
        with get_sync_ctx(model, is_last, config.defer_grad_sync):
            with config.autocast():
                loss_sum = loss_fn(model, batch)
            loss_sum.backward()
        losses.append(loss_sum.detach())

    loss_sum = sum_losses(losses, device=config.device, dp_group=config.dp_group)
    wait_for(counts_ready)
    counts[:-2] //= dist.get_world_size() // dist.get_world_size(config.dp_group)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_averaged = num_ranks_averaged(model, dist.get_world_size(config.dp_group))
    # It stays on the host, which knows the counts: a copy to the device would wait for the whole backward, and a scalar
    # of the host travels with the operation that takes it.
    scale = mean_scale(counts[0], num_averaged)
    grad_norm = total_grad_norm(parameters) * scale
    # Undoing the wrapper's average, dividing by the tokens and clipping are one pass over the gradients.
    scale_gradients_(parameters, scale * clip_coefficient(grad_norm, config.clip_norm))

    is_bad = 1.0 - (torch.isfinite(loss_sum) & torch.isfinite(grad_norm)).float()
    num_label_tokens, *others = counts.tolist()
    if num_label_tokens:
        _step_unless(optimizer, is_bad)
    zero_gradients(model, optimizer)
    return StepResult(loss_sum, grad_norm, DeferredFlag(is_bad), num_label_tokens, *others)


def warm_up_buckets(
    model: nn.Module, batch: Batch, *, loss_fn: LossFn, optimizer: torch.optim.Optimizer, config: StepConfig
) -> None:
    """Have DDP order its buckets before the first step; every rank must call it, with any micro-batch of its own.

    DDP orders them anew after the first backward. Of three or more ranks, the place of a gradient in its bucket
    decides the order in which it is summed, so that the first step of a resumed run would differ in the last bits from
    that of the run that was never stopped. No weight, no gradient and no random state changes. It takes the memory of a
    step's micro-batch: the model is in the mode in which it trains.
    """
    if not isinstance(find_wrapper(model), DistributedDataParallel) or dist.get_world_size(config.dp_group) < 3:
        return
    state = rng_state()
    batch = {name: tensor.to(config.device, non_blocking=True) for name, tensor in batch.items()}
    with config.autocast():
        loss_sum = loss_fn(model, batch)
    loss_sum.backward()
    zero_gradients(model, optimizer)
    set_rng_state(state)


def _count_tokens(micro_batches: Sequence[Batch]) -> tuple[int, int, int]:
    """Return this rank's (supervised positions, tokens that are not padding, squared lengths), counted on the host.

    A dummy has no supervised position, and its filler token does not count as a token either. A packed batch has no
    mask and brings its ``num_tokens``.
    """
    num_label_tokens = num_tokens = sum_squared_lengths = 0
    for batch in micro_batches:
        supervised = int((batch["labels"] != IGNORE_INDEX).sum())
        num_label_tokens += supervised
        if "num_tokens" in batch:
            num_tokens += int(batch["num_tokens"])
            # 1 + 3 + 5 + ... over the positions of a document is the square of its length
            sum_squared_lengths += int((2 * batch["position_ids"] + 1).sum())
        elif supervised:
            lengths = batch["attention_mask"].sum(dim=-1)
            num_tokens += int(lengths.sum())
            sum_squared_lengths += int(lengths.square().sum())
    return num_label_tokens, num_tokens, sum_squared_lengths


def _step_unless(optimizer: torch.optim.Optimizer, is_bad: torch.Tensor) -> None:
    """Step the optimizer unless ``is_bad`` is 1, without asking the host where the optimizer can look itself.

    Weights that were offloaded are elsewhere than the flag: the optimizer would copy it to them without waiting, and
    look before it has come.
    """
    has_flag = all(p.device.type == is_bad.device.type for group in optimizer.param_groups for p in group["params"])
    if has_flag and all(group.get("fused") for group in optimizer.param_groups):
        # The fused kernels skip on the device by this flag, as torch.amp.GradScaler uses them.
        optimizer.grad_scale = None
        optimizer.found_inf = is_bad
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif not to_host(is_bad):
        optimizer.step()
