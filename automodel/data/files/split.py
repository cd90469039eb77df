"""Cut rows by a split string as the library ``datasets`` writes them: ``train[:100]``, ``train[10%:-20%]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from automodel.types import UserError

_SPLIT = re.compile(
    r"(?P<name>[^\[\]()+:%\s]+)"
    r"(?:\[(?P<start>-?\d[\d_]*)?(?P<start_percent>%)?:(?P<stop>-?\d[\d_]*)?(?P<stop_percent>%)?\])?"
)


@dataclass(frozen=True)
class RowSlice:
    """A part of the rows; bounds as in a Python slice, in percent of the rows if ``is_percent``."""

    name: str
    start: int | None = None
    stop: int | None = None
    is_percent: bool = False

    @property
    def needs_count(self) -> bool:
        """Whether ``bounds`` needs the number of rows."""
        return any(bound is not None and (self.is_percent or bound < 0) for bound in (self.start, self.stop))

    def bounds(self, num_rows: int | None = None) -> tuple[int, int | None]:
        """Return the first row, counted from 0, and the one behind the last; None if that is the end.

        Percentages are rounded to the nearest row, halves to the even one, as ``datasets`` does by default.

        Args:
            num_rows: may be None unless ``needs_count``; if given, the bounds are within it.
        """
        if num_rows is None:
            assert not self.needs_count
            start = self.start or 0
            return start, None if self.stop is None else max(start, self.stop)
        start = self._row(0 if self.start is None else self.start, num_rows)
        stop = num_rows if self.stop is None else self._row(self.stop, num_rows)
        return start, max(start, stop)

    def _row(self, bound: int, num_rows: int) -> int:
        row = round(bound * num_rows / 100.0) if self.is_percent else bound
        return min(num_rows, max(0, row + num_rows) if row < 0 else row)


def parse_split(split: str) -> RowSlice:
    """Read ``NAME``, ``NAME[START:STOP]`` or ``NAME[START%:STOP%]``; local files have one split, of any name.

    Raises:
        UserError: it is none of these, mixes rows with percent, or leaves 100 percent.
    """
    key = f"dataset.split={split}"
    if "+" in split:
        raise UserError(f"{key}: local files have one split, so splits cannot be added; name the files in dataset.path")
    match = _SPLIT.fullmatch(split.strip())
    if (
        match is None
        or (match["start_percent"] and not match["start"])
        or (match["stop_percent"] and not match["stop"])
    ):
        raise UserError(f"{key}: not a split; write train, train[:100], train[-500:] or train[10%:20%]")
    start, stop = (int(match[bound]) if match[bound] else None for bound in ("start", "stop"))
    percents = {bool(match[f"{bound}_percent"]) for bound in ("start", "stop") if match[bound]}
    if len(percents) == 2:
        raise UserError(f"{key}: one bound is in percent and the other in rows; write both in percent, or both in rows")
    is_percent = percents == {True}
    if is_percent and any(abs(bound or 0) > 100 for bound in (start, stop)):
        raise UserError(f"{key}: percentages go from -100% to 100%")
    return RowSlice(match["name"], start, stop, is_percent)
