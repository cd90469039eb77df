"""Scale, measure and clip gradients, whatever wrapper or sharding they live in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from automodel.distributed.reduce import all_reduce_sum_

if TYPE_CHECKING:
    from torch import nn


def scale_gradients_(parameters: Iterable[nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply every gradient in place by ``factor``, a scalar tensor on any device."""
    grads = [_local(p.grad) for p in parameters if p.grad is not None]
    grads = [grad for grad in grads if grad.numel()]
    if grads:
        torch._foreach_mul_(grads, factor.to(grads[0].device))


@torch.no_grad()
def total_grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the global 2-norm of the gradients as a float32 scalar, the same on every rank.

    Sharded gradients are summed over the axes of their own mesh on which they are sharded, so that plain
    tensors and tensors of several meshes may be mixed. Every rank must call it: it communicates.
    """
    squares: dict[object, list[torch.Tensor]] = defaultdict(list)
    device = torch.device("cpu")
    for parameter in parameters:
        device = parameter.device
        if parameter.grad is None:
            continue
        mesh = (parameter.grad.device_mesh, _sharded_axes(parameter.grad)) if _is_sharded(parameter.grad) else None
        squares[mesh].append(_square_sum(_local(parameter.grad)))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for mesh, parts in squares.items():
        partial = torch.stack(parts).sum()
        if mesh is not None:
            device_mesh, axes = mesh
            for axis in axes:
                all_reduce_sum_(partial, device_mesh.get_group(axis))
        total = total + partial
    return total.sqrt()


def clip_coefficient(norm: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """Return the factor (at most 1) that brings ``norm`` to ``max_norm``; 1 when ``max_norm`` is None."""
    if max_norm is None:
        return torch.ones_like(norm)
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def mean_scale(num_label_tokens: torch.Tensor, num_averaged: int) -> torch.Tensor:
    """Return what turns wrapper-averaged gradients of a loss sum into those of the mean over all tokens.

    Args:
        num_label_tokens: global number of supervised tokens of the step (scalar, any integer type).
        num_averaged: over how many ranks the wrapper averaged (1 when it did not).

    Returns:
        float32 scalar ``num_averaged / num_label_tokens``; 0 where there are no tokens, so that no NaN arises.
    """
    tokens = num_label_tokens.to(torch.float32)
    return torch.where(tokens > 0, num_averaged / tokens.clamp(min=1), torch.zeros_like(tokens))


@torch.no_grad()
def rescale_gradients(
    model: nn.Module, num_tokens_for_grad_scaling: torch.Tensor, dp_group: dist.ProcessGroup | None = None
) -> None:
    """Turn gradients of a loss sum, averaged by the wrapper over ``dp_group``, into those of the global token mean.

    Args:
        model: its ``.grad`` tensors are changed in place.
        num_tokens_for_grad_scaling: this rank's number of supervised tokens of the whole step; not changed.
        dp_group: the group over which the wrapper averaged and the counts are summed; None: nothing is summed.
    """
    num_tokens = num_tokens_for_grad_scaling.detach().clone().to(torch.int64)
    all_reduce_sum_(num_tokens, dp_group)
    factor = mean_scale(num_tokens, 1 if dp_group is None else dist.get_world_size(dp_group))
    scale_gradients_(model.parameters(), factor)


@torch.no_grad()
def clip_gradients(model: nn.Module, clip_norm: float | None, foreach: bool = True) -> torch.Tensor:
    """Clip the gradients in place to the global 2-norm ``clip_norm``; None only measures.

    Every rank must call it, after ``rescale_gradients``.

    Args:
        model: its ``.grad`` tensors are changed in place.
        clip_norm: the largest norm allowed, or None.
        foreach: kept for the documented signature; the fused path is always right and always used.

    Returns:
        The norm before clipping: a float32 scalar tensor, the same on every rank.
    """
    parameters = list(model.parameters())
    norm = total_grad_norm(parameters)
    if clip_norm is not None:
        scale_gradients_(parameters, clip_coefficient(norm, clip_norm))
    return norm


def _local(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _is_sharded(grad: torch.Tensor) -> bool:
    return isinstance(grad, DTensor) and bool(_sharded_axes(grad))


def _sharded_axes(grad: DTensor) -> tuple[int, ...]:
    return tuple(axis for axis, placement in enumerate(grad.placements) if not placement.is_replicate())


def _square_sum(grad: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(grad, dtype=torch.float32) ** 2
