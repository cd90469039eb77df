"""Scale, measure and clip gradients in any wrapper and sharding."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from automodel.distributed.parallel.handle import handle_of
from automodel.distributed.parallel.reduce import all_reduce_, all_reduce_sum_

if TYPE_CHECKING:
    from torch import nn


def scale_gradients_(parameters: Iterable[nn.Parameter], factor: torch.Tensor) -> None:
    """Multiply every gradient in place by ``factor``, a scalar tensor on any device."""
    grads = [_local(p.grad) for p in parameters if p.grad is not None]
    grads = [grad for grad in grads if grad.numel()]
    if not grads:
        return
    is_known = factor.device.type == "cpu" and grads[0].device.type != "cpu"  # to the host, which need not copy it
    torch._foreach_mul_(grads, factor.item() if is_known else factor.to(grads[0].device))


@torch.no_grad()
def total_grad_norm(parameters: Iterable[nn.Parameter], *, norm_type: float = 2.0) -> torch.Tensor:
    """Return the global norm of the gradients as a float32 scalar, the same on every rank.

    Sharded gradients are summed over the axes of their own mesh on which they are sharded, so that plain
    tensors and tensors of several meshes may be mixed, and a rank may hold nothing of a parameter. Every rank
    must call it: it communicates.

    Args:
        norm_type: p of the p-norm; ``inf`` for the largest absolute value.
    """
    grads: dict[object, list[torch.Tensor]] = defaultdict(list)
    device = torch.device("cpu")
    for parameter in parameters:
        device = parameter.device
        # Read from the parameter: a gradient may be missing where the shard is empty, and may name an equal mesh
        # with other groups, since DTensor's operators share cached layouts between equal meshes.
        if isinstance(parameter.grad, DTensor) and any(p.is_partial() for p in parameter.grad.placements):
            raise TypeError("a gradient is still a partial sum over its mesh; reduce it before its norm is taken")
        holder = parameter if isinstance(parameter, DTensor) or parameter.grad is None else parameter.grad
        mesh = (holder.device_mesh, _sharded_axes(holder)) if _is_sharded(holder) else None
        held = grads[mesh]  # also where this rank holds nothing of it: the others wait for its part
        if parameter.grad is not None and _local(parameter.grad).numel():
            held.append(_local(parameter.grad))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for mesh, held in grads.items():
        norms = torch._foreach_norm(held, norm_type, dtype=torch.float32) if held else [torch.zeros_like(total)]
        norms = torch.stack(norms)
        partial = norms.amax() if math.isinf(norm_type) else norms.pow(norm_type).sum()
        if mesh is not None:
            device_mesh, axes = mesh
            for axis in axes:
                op = dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM
                all_reduce_(partial, device_mesh.get_group(axis), op)
        total = torch.maximum(total, partial) if math.isinf(norm_type) else total + partial
    return total if math.isinf(norm_type) else total ** (1.0 / norm_type)


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
    """Turn gradients of a loss sum, as the wrapper reduced them, into those of the global token mean.

    Every rank of the group must call it, after the last backward of a step.

    Args:
        model: its ``.grad`` tensors are changed in place.
        num_tokens_for_grad_scaling: this rank's number of supervised tokens of the whole step; not changed.
        dp_group: the ranks that share the rows. None: those over which the model's wrapper reduces, so that
            replicas cannot drift apart; a plain model counts for itself alone.
    """
    handle = handle_of(model)
    num_tokens = num_tokens_for_grad_scaling.detach().clone().to(torch.int64)
    num_ranks = 1
    for group in handle.groups() if dp_group is None else [dp_group]:
        all_reduce_sum_(num_tokens, group)
        num_ranks *= dist.get_world_size(group)
    scale_gradients_(model.parameters(), mean_scale(num_tokens, handle.num_ranks_averaged(num_ranks)))


@torch.no_grad()
def clip_gradients(
    model: nn.Module, clip_norm: float | None, foreach: bool = True, *, norm_type: float = 2.0
) -> torch.Tensor:
    """Clip the gradients in place to the global norm ``clip_norm``; None only measures.

    Every rank must call it, after ``rescale_gradients``.

    Args:
        model: its ``.grad`` tensors are changed in place.
        clip_norm: the largest norm allowed, or None.
        foreach: kept for the documented signature; the fused path is always right and always used.
        norm_type: p of the p-norm, or ``inf``.

    Returns:
        The norm before clipping: a float32 scalar tensor, the same on every rank.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = total_grad_norm(parameters, norm_type=norm_type)
    if clip_norm is not None:
        scale_gradients_(parameters, clip_coefficient(norm, clip_norm))
    return norm


def _local(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor) and bool(_sharded_axes(tensor))


def _sharded_axes(tensor: DTensor) -> tuple[int, ...]:
    return tuple(axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate())
