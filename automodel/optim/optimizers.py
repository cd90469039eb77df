"""Parameter groups and the optimizers that take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    import torch
    from torch import nn


Beta = Annotated[float, Field(ge=0, lt=1)]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trained parameters: matrices decay as configured; norms, biases and other vectors never do.

    Parameters on different meshes (some tensor parallel, some not) get separate groups: fused kernels take parameters
    of one mesh at a time.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (parameter.ndim >= 2, getattr(parameter, "device_mesh", None))
            groups.setdefault(key, []).append(parameter)
    matrices = [{"params": group} for (decays, _), group in groups.items() if decays]
    vectors = [{"params": group, "weight_decay": 0.0} for (decays, _), group in groups.items() if not decays]
    return matrices + vectors


def adamw(
    params: Sequence[dict[str, Any]],
    *,
    lr: PositiveFloat = 1e-5,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: NonNegativeFloat = 1e-8,
    weight_decay: NonNegativeFloat = 0.01,
) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov and Hutter 2019), fused where torch has a fused kernel for the device."""
    import torch

    return torch.optim.AdamW(
        params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=_has_fused_kernel(params)
    )


def sgd(
    params: Sequence[dict[str, Any]],
    *,
    lr: PositiveFloat = 1e-3,
    momentum: NonNegativeFloat = 0.0,
    weight_decay: NonNegativeFloat = 0.0,
) -> torch.optim.Optimizer:
    """Build stochastic gradient descent, fused where torch has a fused kernel for the device and the sharding."""
    import torch
    from torch.distributed.tensor import DTensor

    is_sharded = any(isinstance(parameter, DTensor) for group in params for parameter in group["params"])
    is_fused = _has_fused_kernel(params) and not is_sharded  # unlike AdamW's, SGD's fused kernel takes no DTensor
    return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=is_fused)


def _has_fused_kernel(params: Sequence[dict[str, Any]]) -> bool:
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    supported = _get_fused_kernels_supported_devices()
    return all(p.device.type in supported for group in params for p in group["params"])
