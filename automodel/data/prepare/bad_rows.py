"""Collect what is wrong with rows, and stop with all of it or skip them."""

from __future__ import annotations

from automodel.data.prepare.options import OnBadRow
from automodel.data.prepare.prepared import RowCounts
from automodel.data.rows import MAX_PROBLEMS, BadRow, raise_problems
from automodel.logs import get_logger, warn_for_all

log = get_logger(__name__)


class BadRows:
    """Collects what is wrong with rows, instead of stopping at the first, or skips and counts them."""

    def __init__(self, policy: OnBadRow, counts: RowCounts) -> None:
        self.policy, self.counts = policy, counts

    def add(self, place: str, error: BadRow) -> None:
        self.counts.num_bad += 1
        if len(self.counts.bad_rows) < MAX_PROBLEMS:
            self.counts.bad_rows.append(f"{place}: {error}")

    def settle(self, name: str) -> None:
        """Raise the problems found, or warn that their rows are skipped."""
        if self.policy == "stop":
            raise_problems(self.counts.bad_rows, self.counts.num_bad)
        warn_of_skipped(name, self.counts)


def warn_of_skipped(name: str, counts: RowCounts) -> None:
    """Warn of the damaged rows that were skipped, if any."""
    if counts.num_bad:
        first = "\n  ".join(counts.bad_rows)
        warn_for_all(log, "%s: %d damaged rows are skipped, the first of them:\n  %s", name, counts.num_bad, first)
