"""Losses that go wrong on purpose; named as a user would name a loss of their own."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn

from automodel.data.batches.batch import Batch
from automodel.losses.cross_entropy import CrossEntropy
from automodel.train import save_clock


class NanAtThirdCall(CrossEntropy):
    """Gives a loss that is not a number at the third micro-batch."""

    calls = 0

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        type(self).calls += model.training
        loss = super().__call__(model, batch)
        return loss * float("nan") if type(self).calls == 3 and model.training else loss


class Slow(CrossEntropy):
    """Takes its time, so that a test can interrupt the run."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        time.sleep(0.1)
        return super().__call__(model, batch)


class AskedToStopInEvaluation(CrossEntropy):
    """Signals the last rank in the second batch of an evaluation after training, and counts those that follow."""

    trained = evaluated = 0

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        kind = type(self)
        kind.trained += model.training
        kind.evaluated += not model.training and kind.trained > 0
        if "ASK_TO_STOP" in os.environ and not model.training:
            assert kind.evaluated <= 4, "the evaluation went on after the signal"
            if kind.evaluated == 2 and dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(model, batch)


class GrowsWithEveryCall(Slow):
    """Depends on how often it was called, which no checkpoint knows."""

    calls = 0

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        type(self).calls += model.training
        return super().__call__(model, batch) * (1 + 0.01 * type(self).calls)


class OnLastRankAtEighthCall(CrossEntropy):
    """Does something fatal on one rank alone, in the eighth micro-batch of training."""

    calls = 0

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        type(self).calls += model.training
        if type(self).calls == 8 and model.training and dist.get_rank() == dist.get_world_size() - 1:
            self.go_wrong()
        return super().__call__(model, batch)

    def go_wrong(self) -> None:
        """Do it."""


class Raises(OnLastRankAtEighthCall):
    def go_wrong(self) -> None:
        raise ValueError("this rank went wrong on purpose")


class Exits(OnLastRankAtEighthCall):
    def go_wrong(self) -> None:
        os._exit(0)


class Killed(OnLastRankAtEighthCall):
    def go_wrong(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Sleeps(OnLastRankAtEighthCall):
    def go_wrong(self) -> None:
        time.sleep(600)


class Stopped(OnLastRankAtEighthCall):
    def go_wrong(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class SavedAtOnce(CrossEntropy):
    """Makes a save by the clock due after every step."""

    def __init__(self) -> None:
        save_clock._LEAST_SEC = 0.0
