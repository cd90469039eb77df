"""Learning-rate schedules: warm-up, then cosine, linear or constant.

With N steps in the run, W of them warm-up, and k = max(W, 1) the step at the peak, step s = 1 .. N has the rate

    peak * s / W                          for s < k
    peak * decay((s - k) / (N + 1 - k))   for s >= k

where ``decay`` falls from 1 at 0 to ``min_lr_ratio`` at 1. It would reach ``min_lr_ratio`` at step N + 1, so every step
trains: without warm-up the first step is at the peak, and the last step is above ``min_lr_ratio``. Without warm-up the
rates equal those of transformers' schedules of the same names; with warm-up theirs start at 0, where nothing trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt

from automodel.logs import get_logger, warn_for_all

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

log = get_logger(__name__)

Ratio = Annotated[float, Field(ge=0, le=1)]


def cosine(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_ratio: Ratio = 0.03,
    warmup_steps: NonNegativeInt | None = None,
    min_lr_ratio: Ratio = 0.0,
) -> LRScheduler:
    """Warm up in a straight line, then decay: ``m + (1 - m) * (1 + cos(pi * progress)) / 2``, m the minimum's ratio."""

    def decay(progress: float) -> float:
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return _schedule(
        optimizer, total_steps, num_warmup=_num_warmup(total_steps, warmup_ratio, warmup_steps), decay=decay
    )


def linear(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_ratio: Ratio = 0.03,
    warmup_steps: NonNegativeInt | None = None,
    min_lr_ratio: Ratio = 0.0,
) -> LRScheduler:
    """Warm up in a straight line, then decay in one: ``1 - (1 - m) * progress``, m the minimum's ratio."""

    def decay(progress: float) -> float:
        return 1 - (1 - min_lr_ratio) * progress

    return _schedule(
        optimizer, total_steps, num_warmup=_num_warmup(total_steps, warmup_ratio, warmup_steps), decay=decay
    )


def constant(
    optimizer: Optimizer, total_steps: int, *, warmup_ratio: Ratio = 0.03, warmup_steps: NonNegativeInt | None = None
) -> LRScheduler:
    """Warm up in a straight line, then stay at the peak."""
    num_warmup = _num_warmup(total_steps, warmup_ratio, warmup_steps)
    return _schedule(optimizer, total_steps, num_warmup=num_warmup, decay=lambda progress: 1.0)


def _num_warmup(total_steps: int, ratio: float, steps: int | None) -> int:
    # Rounded first: 0.07 x 100 is a little more than 7 in floating point.
    return math.ceil(round(ratio * total_steps, 6)) if steps is None else steps


def _schedule(
    optimizer: Optimizer, total_steps: int, *, num_warmup: int, decay: Callable[[float], float]
) -> LRScheduler:
    from torch.optim.lr_scheduler import LambdaLR

    peak = max(num_warmup, 1)
    if peak >= total_steps > 1:
        warn_for_all(
            log,
            "the warm-up takes %d steps and the run has %d: the learning rate rises to the end, where it is %.0f%% of "
            "optimizer.lr; reduce lr_scheduler.warmup_steps or warmup_ratio",
            num_warmup, total_steps, 100 * total_steps / num_warmup,
        )  # fmt: skip

    def factor(num_done: int) -> float:
        """Return the share of the peak for the step after ``num_done`` steps."""
        step = num_done + 1
        if step < peak:
            return step / num_warmup
        return decay(min(1.0, (step - peak) / max(1, total_steps + 1 - peak)))

    return LambdaLR(optimizer, factor)
