"""Learning-rate schedules: warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def cosine(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_ratio: float = 0.03,
    warmup_steps: int | None = None,
    min_lr_ratio: float = 0.0,
) -> LRScheduler:
    """Warm up in a straight line, then follow half a cosine down to ``min_lr_ratio`` of the peak."""

    def decay(progress: float) -> float:
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return _schedule(
        optimizer, total_steps, num_warmup=_num_warmup(total_steps, warmup_ratio, warmup_steps), decay=decay
    )


def linear(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_ratio: float = 0.03,
    warmup_steps: int | None = None,
    min_lr_ratio: float = 0.0,
) -> LRScheduler:
    """Warm up in a straight line, then go down in one to ``min_lr_ratio`` of the peak."""

    def decay(progress: float) -> float:
        return 1 - (1 - min_lr_ratio) * progress

    return _schedule(
        optimizer, total_steps, num_warmup=_num_warmup(total_steps, warmup_ratio, warmup_steps), decay=decay
    )


def constant(
    optimizer: Optimizer, total_steps: int, *, warmup_ratio: float = 0.03, warmup_steps: int | None = None
) -> LRScheduler:
    """Warm up in a straight line, then stay at the peak."""
    num_warmup = _num_warmup(total_steps, warmup_ratio, warmup_steps)
    return _schedule(optimizer, total_steps, num_warmup=num_warmup, decay=lambda progress: 1.0)


def _num_warmup(total_steps: int, ratio: float, steps: int | None) -> int:
    return math.ceil(ratio * total_steps) if steps is None else steps


def _schedule(
    optimizer: Optimizer, total_steps: int, *, num_warmup: int, decay: Callable[[float], float]
) -> LRScheduler:
    from torch.optim.lr_scheduler import LambdaLR

    def factor(step: int) -> float:
        """Share of the peak for the update number ``step`` (from 0): the first one already moves."""
        if step < num_warmup:
            return (step + 1) / num_warmup
        return decay(min(1.0, (step - num_warmup + 1) / max(1, total_steps - num_warmup)))

    return LambdaLR(optimizer, factor)
