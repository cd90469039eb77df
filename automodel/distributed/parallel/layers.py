"""What a transformers model says about itself: its layers, its number of weights, and whether it has adapters."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


def num_weights(parameter: torch.Tensor) -> int:
    """Return the number of weights in a parameter, also in one whose weights bitsandbytes has packed."""
    quantized = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantized is None else math.prod(quantized.shape)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules to shard or checkpoint one by one, outermost first.

    They are the classes that the model names in ``_no_split_modules``; a model without that gets the members
    of its longest ``ModuleList``.
    """
    from torch import nn

    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        found = list(max(lists, key=len, default=()))
    inside = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inside]


def is_peft_model(model: nn.Module) -> bool:
    """Return whether ``model`` is PEFT's wrapper of a model with adapters; imports nothing."""
    package = sys.modules.get("peft")
    return package is not None and isinstance(model, package.PeftModel)
