"""Decide for each micro-batch whether its backward communicates gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from automodel.distributed.parallel.handle import find_wrapper, is_megatron_fsdp
from automodel.types import UserError


def get_sync_ctx(
    model: nn.Module, is_optim_step: bool, defer_fsdp_grad_sync: bool = True
) -> AbstractContextManager[None]:
    """Return the context for the forward AND backward of one micro-batch.

    Args:
        model: plain, DDP, FSDP2, HSDP or MegatronFSDP; also behind the wrappers of torch.compile and PEFT.
        is_optim_step: this is the last micro-batch before the optimizer's step.
        defer_fsdp_grad_sync: FSDP2 and HSDP reduce gradients on the last micro-batch alone, at the price of
            an unsharded gradient in memory. Otherwise FSDP2 reduce-scatters on every micro-batch, and HSDP
            reduce-scatters on every one and all-reduces on the last alone. DDP always defers. MegatronFSDP does
            as its ZeRO stage allows: stage 1 reduces on the last micro-batch, stages 2 and 3 on every one; what
            goes over the outer axis waits for the last.

    Raises:
        TypeError: a distributed wrapper that is not known here, for which any guess could be wrong.
        UserError: under DDP, at the end of the last micro-batch, trained parameters that got no gradient.
    """
    wrapper = find_wrapper(model)
    if wrapper is None:
        return nullcontext()
    if isinstance(wrapper, DistributedDataParallel):
        return _ddp_sync(wrapper) if is_optim_step else wrapper.no_sync()
    if is_megatron_fsdp(wrapper):
        return _megatron_sync(wrapper, is_optim_step)
    return _fsdp_sync(model, is_optim_step, defer=defer_fsdp_grad_sync)


@contextmanager
def _ddp_sync(wrapper: DistributedDataParallel) -> Iterator[None]:
    yield
    named = wrapper.module.named_parameters()
    unused = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
    if unused:
        # DDP waits for every one of them: the gradients of this step were not reduced, and torch says nothing yet.
        raise UserError(
            f"{len(unused)} trained parameters take no part in the loss, such as {unused[0]}: "
            "distributed=ddp reduces nothing without them; freeze them, or use distributed=fsdp2"
        )


@contextmanager
def _fsdp_sync(model: nn.Module, is_optim_step: bool, *, defer: bool) -> Iterator[None]:
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def set_sync(*, reduce_scatter: bool, all_reduce: bool, last: bool) -> None:
        for unit in units:
            unit.set_requires_gradient_sync(reduce_scatter, recurse=False)
            unit.set_requires_all_reduce(all_reduce, recurse=False)
            unit.set_is_last_backward(last)

    set_sync(reduce_scatter=is_optim_step or not defer, all_reduce=is_optim_step, last=is_optim_step)
    try:
        yield
    finally:
        # The setters are sticky: leave the module as torch makes it.
        set_sync(reduce_scatter=True, all_reduce=True, last=True)


@contextmanager
def _megatron_sync(wrapper: Any, is_optim_step: bool) -> Iterator[None]:
    before = wrapper.model_auto_sync
    wrapper.model_auto_sync = False  # it would reduce a buffer of accumulated gradients again
    wrapper.is_last_microbatch = is_optim_step
    try:
        yield
        if is_optim_step:
            wrapper.finish_grad_sync()
            _give_empty_shards_a_gradient(wrapper)
    finally:
        wrapper.model_auto_sync = before
        wrapper.is_last_microbatch = False


def _give_empty_shards_a_gradient(wrapper: nn.Module) -> None:
    """Let every rank step every parameter, so that the optimizer's state has the same entries on all of them."""
    for parameter in wrapper.parameters():
        is_empty = isinstance(parameter, DTensor) and parameter.to_local().numel() == 0
        if parameter.requires_grad and parameter.grad is None and is_empty:
            empty = torch.zeros_like(parameter.to_local())
            parameter.grad = DTensor.from_local(
                empty,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
