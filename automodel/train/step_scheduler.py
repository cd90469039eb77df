"""Count the steps and say what is due at each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

_NUM_EVALUATIONS = 5
"""Evaluations that ``auto`` spreads evenly over a run: enough to see a trend."""


@dataclass
class StepScheduler:
    """Counts optimizer steps (from 1) and says what is due after the current one.

    Attributes:
        steps_per_epoch: optimizer steps in one pass over the rows; None for a stream of unknown length, which needs
            ``max_steps``.
        val_every_steps: ``auto``: a few times in the run; None: only at the end.
        ckpt_every_steps: ``auto``: the loop also saves by the clock; None: only at the end.
        keeps_best: whether the best checkpoint is kept; ``auto`` then saves at the steps that are evaluated.
        step: optimizer steps done; the only state.
    """

    steps_per_epoch: int | None
    num_epochs: int
    max_steps: int | None = None
    val_every_steps: int | Literal["auto"] | None = None
    ckpt_every_steps: int | Literal["auto"] | None = None
    log_every_steps: int = 1
    keeps_best: bool = False
    step: int = 0

    @property
    def total_steps(self) -> int:
        """Steps until the epochs or ``max_steps`` end, whichever is first."""
        if self.steps_per_epoch is None:
            return self.max_steps
        by_epochs = self.num_epochs * self.steps_per_epoch
        return by_epochs if self.max_steps is None else min(by_epochs, self.max_steps)

    @property
    def is_last_step(self) -> bool:
        return self.step >= self.total_steps

    @property
    def is_log_step(self) -> bool:
        return self.is_last_step or self.step == 1 or self.step % self.log_every_steps == 0

    @property
    def val_interval(self) -> int | None:
        """Steps between evaluations; None: there is only one, at the end."""
        if self.val_every_steps != "auto":
            return self.val_every_steps
        if self.keeps_best and isinstance(self.ckpt_every_steps, int):
            return self.ckpt_every_steps
        return math.ceil(self.total_steps / _NUM_EVALUATIONS)

    @property
    def ckpt_interval(self) -> int | None:
        """Steps between checkpoints; None: there is one at the end, and possibly others by the clock."""
        if self.ckpt_every_steps != "auto":
            return self.ckpt_every_steps
        return self.val_interval if self.keeps_best else None

    @property
    def saves_by_clock(self) -> bool:
        return self.ckpt_every_steps == "auto"

    @property
    def is_val_step(self) -> bool:
        return self.is_last_step or _divides(self.val_interval, self.step)

    @property
    def is_ckpt_step(self) -> bool:
        return self.is_last_step or _divides(self.ckpt_interval, self.step)

    def end_here(self) -> None:
        """Make the current step the last."""
        self.max_steps = self.step

    def count(self, every: int | None) -> int:
        """Return how often in the whole run something happens that is due every ``every`` steps and at the end."""
        if every is None:
            return 1
        return self.total_steps // every + (1 if self.total_steps % every else 0)


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
