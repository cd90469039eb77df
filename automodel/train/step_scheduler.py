"""Which step this is, and what is due at it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepScheduler:
    """Counts optimizer steps (from 1) and answers what is due after the current one.

    Attributes:
        steps_per_epoch: optimizer steps that one pass over the rows takes; None for a stream, whose end is not
            known before it comes, so that ``max_steps`` must be set.
        step: optimizer steps done; the only state.
    """

    steps_per_epoch: int | None
    num_epochs: int
    max_steps: int | None = None
    val_every_steps: int | None = None
    ckpt_every_steps: int | None = None
    log_every_steps: int = 1
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
    def is_val_step(self) -> bool:
        return self.is_last_step or _divides(self.val_every_steps, self.step)

    @property
    def is_ckpt_step(self) -> bool:
        return self.is_last_step or _divides(self.ckpt_every_steps, self.step)

    def end_here(self) -> None:
        """Make the current step the last."""
        self.max_steps = self.step

    def count(self, every: int | None) -> int:
        """Return how often something due every ``every`` steps and at the end happens in the whole run."""
        if every is None:
            return 1
        return self.total_steps // every + (1 if self.total_steps % every else 0)


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
