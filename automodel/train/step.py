"""One optimizer step. Its result depends only on its rows, not on how ranks and micro-batches split them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from automodel.data.batches.batch import Batch
from automodel.distributed.parallel.gradients import (
    clip_coefficient,
    mean_scale,
    scale_gradients_,
    total_grad_norm,
)
from automodel.distributed.parallel.handle import handle_of
from automodel.distributed.parallel.reduce import sum_losses
from automodel.distributed.runtime.agreement import on_every_rank
from automodel.distributed.runtime.waits import to_host, wait_for, wait_for_event
from automodel.losses.objective import Objective, Sums
from automodel.train.rng import rng_state, set_rng_state
from automodel.types import RunError


@dataclass(frozen=True)
class StepConfig:
    """Settings that all steps share.

    Attributes:
        dp_group: the ranks that split the rows of a step, and over which the wrapper averages gradients.
        clip_norm: largest global gradient norm, or None.
        autocast: makes the autocast context of a forward pass.
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
        """Wait for the flag and return it."""
        if self._event is not None:
            wait_for_event(self._event)
        return bool(to_host(self._value))


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, global over all ranks; ``loss_sum``, ``terms`` and ``grad_norm`` stay on the device.

    Attributes:
        terms: the objective's further sums, by name.
        grad_norm: of the gradient of the mean loss, before clipping.
        count: the divisor of the sums.
        is_bad: whether the loss or the norm was not finite; then no weight has changed.
        num_slots: tokens that were computed, padding included.
        sum_squared_lengths: of the documents, packed or padded; the padded tail of a pack counts as a document.
        num_stop_requests: ranks that asked to stop after this step.
        num_save_requests: ranks that asked for a checkpoint after this step.
    """

    loss_sum: torch.Tensor
    grad_norm: torch.Tensor
    is_bad: DeferredFlag
    terms: dict[str, torch.Tensor]
    count: int
    num_label_tokens: int
    num_tokens: int
    num_slots: int
    sum_squared_lengths: int
    num_stop_requests: int
    num_save_requests: int


def train_step(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: StepConfig,
    is_first: bool = False,
    wants_stop: bool = False,
    wants_save: bool = False,
) -> StepResult:
    """Take one optimizer step over ``micro_batches``; every rank must call it with the same number of them.

    The gradients become those of (global loss sum / global count), independent of the wrapper's averaging, and are
    clipped. A step whose count is 0, or whose loss or norm is not finite, changes no weight on any rank.

    Args:
        is_first: compare the names of the objective's terms between the ranks, before they are summed.
    """
    # On the host, where gloo sums them over the ranks while the backward runs: the device is never waited for.
    # Over all ranks, also those of a tensor-parallel group, which count the same rows: they must all stop or save.
    requests = [int(wants_stop), int(wants_save)]
    counts = torch.tensor(_counts(micro_batches, objective) + requests, dtype=torch.int64)
    counts_ready = dist.all_reduce(counts, async_op=True)

    handle, results = handle_of(model), []
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        batch = batch.to(config.device)
        with handle.sync_context(is_last, defer=config.defer_grad_sync):
            with config.autocast():
                sums = objective(model, batch)
            sums.loss.backward()
        results.append(_detached(sums))

    if is_first:
        _require_same_terms(results)
    names = sorted(results[0].terms)
    losses = [[each.loss for each in results], *([each.terms[name] for each in results] for name in names)]
    loss_sum, *terms = sum_losses(losses, device=config.device, dp_group=config.dp_group)
    wait_for(counts_ready)
    counts[:-2] //= dist.get_world_size() // dist.get_world_size(config.dp_group)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_averaged = handle.num_ranks_averaged(dist.get_world_size(config.dp_group))
    # The scale stays on the host: copying it to the device would wait for the whole backward, while an operation takes
    # a host scalar along as an argument.
    scale = mean_scale(counts[0], num_averaged)
    grad_norm = total_grad_norm(parameters) * scale
    # One pass over the gradients undoes the wrapper's average, divides by the count and clips.
    scale_gradients_(parameters, scale * clip_coefficient(grad_norm, config.clip_norm))

    is_bad = 1.0 - (torch.isfinite(loss_sum) & torch.isfinite(grad_norm)).float()
    count, *others = counts.tolist()
    if count:
        _step_unless(optimizer, is_bad)
    handle.zero_gradients(optimizer)
    terms_by_name = dict(zip(names, terms, strict=True))
    return StepResult(loss_sum, grad_norm, DeferredFlag(is_bad), terms_by_name, count, *others)


def _counts(micro_batches: Sequence[Batch], objective: Objective) -> list[int]:
    """Return this rank's counts as ``StepResult`` lists them."""
    return [
        sum(map(objective.count, micro_batches)),
        sum(batch.num_label_tokens for batch in micro_batches),
        sum(batch.num_tokens for batch in micro_batches),
        sum(batch.num_slots for batch in micro_batches),
        sum(batch.sum_squared_lengths for batch in micro_batches),
    ]


def _detached(sums: Sums) -> Sums:
    return Sums(sums.loss.detach(), {name: value.detach() for name, value in sums.terms.items()})


def _require_same_terms(results: Sequence[Sums]) -> None:
    """Raise on every rank unless all micro-batches of all ranks have terms of the same names."""
    own = [sorted(sums.terms) for sums in results]
    of_all = [own] if dist.get_world_size() == 1 else on_every_rank(own)
    names = [each for of_rank in of_all for each in of_rank]
    if any(each != names[0] for each in names):
        found = " and ".join(sorted({", ".join(each) or "none" for each in names}))
        raise RunError(f"loss_fn: the terms must have the same names for every batch on every rank; found: {found}")


def warm_up_buckets(
    model: nn.Module, batch: Batch, *, objective: Objective, optimizer: torch.optim.Optimizer, config: StepConfig
) -> None:
    """Run a backward before the first step if the wrapper orders its buckets by it; every rank must call it.

    Otherwise the first step of a resumed run would sum gradients in another order than an uninterrupted run, and
    differ in the last bits. Weights, gradients and random states stay as they are. It takes the memory of a training
    micro-batch.

    Args:
        batch: any micro-batch of this rank.
    """
    handle = handle_of(model)
    if not handle.needs_warm_up(dist.get_world_size(config.dp_group)):
        return
    state = rng_state()
    with handle.sync_context(True, defer=config.defer_grad_sync):
        with config.autocast():
            sums = objective(model, batch.to(config.device))
        sums.loss.backward()
    handle.zero_gradients(optimizer)
    set_rng_state(state)


def _step_unless(optimizer: torch.optim.Optimizer, is_bad: torch.Tensor) -> None:
    """Step the optimizer unless ``is_bad`` is 1; a fused optimizer reads the flag on the device, without a host sync.

    Offloaded weights are on another device than the flag: the optimizer would copy the flag without waiting and read
    it too early.
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
