"""Sum losses and counts over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist


@torch.no_grad()
def reduce_loss(
    loss_store: Sequence[torch.Tensor],
    total_num_tokens: torch.Tensor,
    per_token_loss: bool = True,
    dp_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the losses of a step over its micro-batches and, with a group, over its ranks.

    Every rank of ``dp_group`` must call it. The caller divides the first by the second.

    Args:
        loss_store: one loss sum a micro-batch of this rank; may be empty.
        total_num_tokens: this rank's number of supervised tokens.
        per_token_loss: the denominator counts tokens; else micro-batches.
        dp_group: the ranks to sum over; None: this rank alone.

    Returns:
        (loss sum, float32 scalar; denominator, int64 scalar), on the device of ``total_num_tokens``.
    """
    device = total_num_tokens.device
    if per_token_loss:
        denominator = total_num_tokens.detach().clone().to(torch.int64).reshape(())
    else:
        denominator = torch.tensor(len(loss_store), dtype=torch.int64, device=device)
    all_reduce_sum_(denominator, dp_group)
    (loss_sum,) = sum_losses([loss_store], device=device, dp_group=dp_group)
    return loss_sum, denominator


def sum_losses(
    losses: Sequence[Sequence[torch.Tensor]], *, device: torch.device, dp_group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """Return, for each list of this rank's scalars (perhaps empty), their sum over the list and the group.

    One reduction serves all lists; every rank of the group must give the same number of them.

    Returns:
        float32 scalars on ``device``.
    """
    sums = []
    for each in losses:
        parts = [loss.detach().to(device=device, dtype=torch.float32).reshape(()) for loss in each]
        sums.append(torch.stack(parts).sum() if parts else torch.zeros((), device=device))
    total = torch.stack(sums) if len(sums) > 1 else sums[0].reshape(1)
    all_reduce_sum_(total, dp_group)
    return list(total.unbind())


def sum_on_host(sums: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Return ``sums`` added over ``group``, float64 on the host, waiting for the device once for all of them.

    Every rank of the group must call it, with the same names and shapes.
    """
    # Those of the host come last, so that only the others are copied.
    names = sorted(sums, key=lambda name: (sums[name].device.type == "cpu", name))
    parts = [sums[name].detach().double().flatten() for name in names]
    num_on_device = sum(sums[name].device.type != "cpu" for name in names)
    copied = [torch.cat(parts[:num_on_device]).cpu()] if num_on_device else []
    flat = torch.cat([torch.zeros(0, dtype=torch.float64), *copied, *parts[num_on_device:]])
    all_reduce_sum_(flat, group)
    split = flat.split([sums[name].numel() for name in names])
    return {name: part.reshape(sums[name].shape) for name, part in zip(names, split, strict=True)}


def all_reduce_sum_(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum ``tensor`` in place over ``group``; nothing is done without one."""
    all_reduce_(tensor, group, dist.ReduceOp.SUM)


def all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType) -> None:
    """Reduce ``tensor`` in place over ``group``.

    Alone there is nothing to send, which matters on mps, whose tensors gloo cannot take.
    """
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
