"""Which checkpoints are kept once a new one is complete."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Retention:
    """The options ``checkpoint.keep_last``, ``keep_every`` and ``keep_best``; each of them keeps checkpoints.

    Attributes:
        keep_last: the number of newest checkpoints to keep; None: all.
        keep_every: keep checkpoints whose step is a multiple of it.
        keep_best: ``min:NAME`` or ``max:NAME`` of a validation metric; keep the best checkpoint by it.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: str | None = None

    @property
    def metric(self) -> str | None:
        """The name of the metric in ``keep_best``, or None."""
        return self.keep_best.partition(":")[2] if self.keep_best else None

    def outdated(self, scores: Mapping[int, float | None], *, newest: int) -> list[int]:
        """Return the steps whose checkpoints can be deleted now that step ``newest`` is complete.

        Steps after ``newest`` were saved before the run resumed from an earlier checkpoint; they are left alone.

        Args:
            scores: the metric of every saved step; None if it was not measured.
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
            kept.add(max(measured, key=lambda step: (measured[step], step)))  # the newer on a tie
        return [step for step in past if step not in kept]


def delete(folder: Path) -> None:
    """Rename a checkpoint away, then delete it: a half-deleted checkpoint would look damaged."""
    doomed = folder.rename(folder.with_name(f".{folder.name}.deleted"))
    shutil.rmtree(doomed)
