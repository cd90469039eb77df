"""Which checkpoints stay once a new one is complete."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Retention:
    """What ``checkpoint.keep_last``, ``keep_every`` and ``keep_best`` say; a checkpoint stays that any of them keeps.

    Attributes:
        keep_last: how many of the newest stay; None: all.
        keep_every: those whose step is a multiple stay.
        keep_best: ``min:NAME`` or ``max:NAME`` of a validation metric; the best one by it stays.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: str | None = None

    @property
    def metric(self) -> str | None:
        """The name of the metric by which the best one is chosen."""
        return self.keep_best.partition(":")[2] if self.keep_best else None

    def outdated(self, scores: Mapping[int, float | None], *, newest: int) -> list[int]:
        """Return the steps whose checkpoints may go now that step ``newest`` is complete.

        Steps after ``newest`` belong to another past of the run and are left alone.

        Args:
            scores: of every step that is there, its metric, or None where it was not measured.
        """
        past = sorted(step for step in scores if step <= newest)
        if self.keep_last is None:
            return []
        kept = {newest, *past[-self.keep_last :]}
        if self.keep_every is not None:
            kept |= {step for step in past if step % self.keep_every == 0}
        sign = -1 if self.keep_best and self.keep_best.startswith("min:") else 1
        measured = {step: sign * scores[step] for step in past if scores[step] is not None}
        measured = {step: score for step, score in measured.items() if math.isfinite(score)}
        if self.keep_best and measured:
            kept.add(max(measured, key=lambda step: (measured[step], step)))  # of equals, the newer
        return [step for step in past if step not in kept]


def delete(folder: Path) -> None:
    """Delete a checkpoint so that it is gone at once: one that is half deleted would look damaged."""
    doomed = folder.rename(folder.with_name(f".{folder.name}.deleted"))
    shutil.rmtree(doomed)
