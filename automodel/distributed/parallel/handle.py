"""Tell what distributed wrapper a model is in, also behind the wrappers of torch.compile and PEFT."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel


def find_wrapper(model: nn.Module) -> nn.Module | None:
    """Return the DDP, MegatronFSDP or FSDP2 module that synchronises the gradients of ``model``; None: it is plain.

    Raises:
        TypeError: a distributed wrapper that is not known here, for which any guess could be wrong.
    """
    for module in model.modules():  # outermost first
        if isinstance(module, DistributedDataParallel | FSDPModule) or is_megatron_fsdp(module):
            return module
        if isinstance(module, FullyShardedDataParallel) or "FSDP" in type(module).__name__:
            raise TypeError(f"{type(module).__qualname__} is a distributed wrapper that is not known here")
    return None


def reshard(model: nn.Module) -> None:
    """Have FSDP2 give gathered parameters back: after a forward without a backward the outermost ones stay whole.

    An optimizer that is built then would hold the whole ones, and update them to no effect.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_megatron_fsdp(module: nn.Module | None) -> bool:
    """Return whether ``module`` is MegatronFSDP's wrapper; imports nothing."""
    package = sys.modules.get("megatron_fsdp")
    return package is not None and isinstance(module, package.MegatronFSDP)


def is_peft_model(module: nn.Module) -> bool:
    """Return whether ``module`` is PEFT's wrapper of a model with adapters; imports nothing."""
    package = sys.modules.get("peft")
    return package is not None and isinstance(module, package.PeftModel)


def unwrap(model: nn.Module) -> Any:
    """Return the transformers or PEFT model inside the wrappers of torch.compile, DDP and MegatronFSDP."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel) or is_megatron_fsdp(model):
            model = model.module
        else:
            return model
