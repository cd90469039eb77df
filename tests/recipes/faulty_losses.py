"""Losses that go wrong on purpose; named as a user would name a loss of their own."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import nn

from automodel.losses.cross_entropy import CrossEntropy


class RaisesOnLastRank(CrossEntropy):
    """Fails on one rank alone, while the others wait in a collective."""

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("this rank went wrong on purpose")
        return super().__call__(model, batch)


class NanAtThirdCall(CrossEntropy):
    """Gives a loss that is not a number at the third micro-batch."""

    calls = 0

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        type(self).calls += model.training
        loss = super().__call__(model, batch)
        return loss * float("nan") if type(self).calls == 3 and model.training else loss


class Slow(CrossEntropy):
    """Takes its time, so that a test can interrupt the run."""

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        time.sleep(0.1)
        return super().__call__(model, batch)
