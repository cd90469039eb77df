"""Which step this is, and what is due at it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class StepScheduler:
    """Counts optimizer steps (from 1) and answers what is due after the current one.

    Attributes:
        steps_per_epoch: optimizer steps that one pass over the rows takes.
        step: optimizer steps done; the only state, from which epoch and position follow.
    """

    steps_per_epoch: int
    num_epochs: int
    max_steps: int | None = None
    val_every_steps: int | None = None
    ckpt_every_steps: int | None = None
    log_every_steps: int = 1
    step: int = 0

    @property
    def total_steps(self) -> int:
        """Steps until the epochs or ``max_steps`` end, whichever is first."""
        by_epochs = self.num_epochs * self.steps_per_epoch
        return by_epochs if self.max_steps is None else min(by_epochs, self.max_steps)

    @property
    def is_last_step(self) -> bool:
        return self.step >= self.total_steps

    @property
    def is_log_step(self) -> bool:
        return self.is_last_step or self.step == 1 or self.step % self.log_every_steps == 0

    @property
    def is_val_step(self) -> bool:
        return self.is_last_step or _divides(self.val_every_steps, self.step)

    @property
    def is_ckpt_step(self) -> bool:
        return self.is_last_step or _divides(self.ckpt_every_steps, self.step)

    @property
    def epoch(self) -> int:
        """The epoch (from 0) that the current step belongs to."""
        return max(0, self.step - 1) // self.steps_per_epoch

    def remaining_epochs(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, number of its steps already done) until all steps are done."""
        while not self.is_last_step:
            yield divmod(self.step, self.steps_per_epoch)

    def count(self, every: int | None) -> int:
        """Return how often something due every ``every`` steps and at the end happens in the whole run."""
        if every is None:
            return 1
        return self.total_steps // every + (1 if self.total_steps % every else 0)


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
