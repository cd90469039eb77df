"""Decide for each micro-batch whether its backward communicates gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel


def get_sync_ctx(
    model: nn.Module, is_optim_step: bool, defer_fsdp_grad_sync: bool = True
) -> AbstractContextManager[None]:
    """Return the context for the forward AND backward of one micro-batch.

    Args:
        model: plain, DDP, FSDP2 or HSDP; also inside torch.compile's wrapper.
        is_optim_step: this is the last micro-batch before the optimizer's step.
        defer_fsdp_grad_sync: FSDP2 and HSDP reduce gradients on the last micro-batch alone, at the price of
            an unsharded gradient in memory. Otherwise FSDP2 reduce-scatters on every micro-batch, and HSDP
            reduce-scatters on every one and all-reduces on the last alone. DDP always defers.

    Raises:
        TypeError: a distributed wrapper that is not known here, for which any guess could be wrong.
    """
    unwrapped = getattr(model, "_orig_mod", model)
    if isinstance(unwrapped, DistributedDataParallel):
        return nullcontext() if is_optim_step else unwrapped.no_sync()
    if isinstance(unwrapped, FSDPModule) or any(isinstance(module, FSDPModule) for module in unwrapped.modules()):
        return _fsdp_sync(unwrapped, is_optim_step, defer=defer_fsdp_grad_sync)
    wrapper = next((m for m in unwrapped.modules() if _is_unknown_wrapper(m)), None)
    if wrapper is not None:
        raise TypeError(f"get_sync_ctx does not know how to defer the gradient sync of {type(wrapper).__qualname__}")
    return nullcontext()


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


def _is_unknown_wrapper(module: nn.Module) -> bool:
    return isinstance(module, FullyShardedDataParallel | DistributedDataParallel) or "FSDP" in type(module).__name__
