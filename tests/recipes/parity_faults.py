"""Losses with which a layout goes another way than one process, or no way at all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from automodel.losses.cross_entropy import CrossEntropy


class ScaledOnRankOne(CrossEntropy):
    """Is half as large again on rank 1 alone, from the second of its steps of two micro-batches on."""

    calls = 0

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        type(self).calls += 1
        loss_sum = super().__call__(model, batch)
        return loss_sum * 1.5 if dist.get_rank() == 1 and type(self).calls > 2 else loss_sum


class Raises(CrossEntropy):
    """Fails at once."""

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("this loss went wrong on purpose")
