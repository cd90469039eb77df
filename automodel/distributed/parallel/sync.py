"""Decide for each micro-batch whether its backward communicates gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from automodel.distributed.parallel.handle import handle_of

if TYPE_CHECKING:
    from torch import nn


def get_sync_ctx(
    model: nn.Module, is_optim_step: bool, defer_fsdp_grad_sync: bool = True
) -> AbstractContextManager[None]:
    """Return the context for the forward AND backward of one micro-batch.

    Args:
        model: plain, DDP, FSDP2, HSDP, MegatronFSDP or a wrapper with a handle of its own; also behind the wrappers of
            torch.compile and PEFT.
        is_optim_step: this is the last micro-batch before the optimizer's step.
        defer_fsdp_grad_sync: FSDP2 and HSDP reduce gradients on the last micro-batch alone, at the price of
            an unsharded gradient in memory. Otherwise FSDP2 reduce-scatters on every micro-batch, and HSDP
            reduce-scatters on every one and all-reduces on the last alone. DDP always defers. MegatronFSDP does
            as its ZeRO stage allows: stage 1 reduces on the last micro-batch, stages 2 and 3 on every one; what
            goes over the outer axis waits for the last.

    Raises:
        TypeError: an unknown distributed wrapper, for which any guess could be wrong.
        UserError: under DDP, at the end of the last micro-batch, trained parameters that got no gradient.
    """
    return handle_of(model).sync_context(is_optim_step, defer=defer_fsdp_grad_sync)
