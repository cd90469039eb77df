"""Parameter groups and the optimizers that take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    import torch
    from torch import nn


Beta = Annotated[float, Field(ge=0, lt=1)]


def parameter_groups(model: nn.Module, *, splits_b: bool = False) -> list[dict[str, Any]]:
    """Split the trained parameters: matrices decay as configured; norms, biases and other vectors never do.

    Parameters on different meshes (some tensor parallel, some not) get separate groups: fused kernels take parameters
    of one mesh at a time.

    Args:
        splits_b: the matrices B of adapters are in separate groups, after all others.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (splits_b and _is_b(name), parameter.ndim < 2, getattr(parameter, "device_mesh", None))
            groups.setdefault(key, []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: item[0][:2])
    return [{"params": group} | ({"weight_decay": 0.0} if is_vector else {}) for (_, is_vector, _), group in ordered]


def build_optimizer(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], model: nn.Module, *, lr_ratio: float | None = None
) -> torch.optim.Optimizer:
    """Build an optimizer of the trained parameters, whose first group has the learning rate that ``make`` gives.

    Args:
        make: what the ``optimizer`` section builds.
        lr_ratio: the matrices B of adapters learn at so many times that rate: LoRA+ (Hayou et al. 2024,
            arXiv 2402.12354); None: at the same rate. A schedule scales both.
    """
    if lr_ratio is None:
        return make(parameter_groups(model))
    optimizer = make(parameter_groups(model, splits_b=True))
    of_b = {id(parameter) for name, parameter in model.named_parameters() if _is_b(name)}
    for group in optimizer.param_groups:
        if id(group["params"][0]) in of_b:
            group["lr"] *= lr_ratio
    return optimizer


def _is_b(name: str) -> bool:
    """Return whether a parameter is the matrix of an adapter that begins at 0."""
    return ".lora_B." in name


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
