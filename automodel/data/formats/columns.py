"""Find the columns of a format in the rows of a file, and note which of their fields nothing reads."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from automodel.data.formats.patterns import Pattern, fields_seen, nearest
from automodel.data.formats.turns import without_nulls
from automodel.data.rows import BadRow, require_text

# Other names of optional columns, tried in each row that does not hold the usual one.
_SYNONYMS = {"tools": "functions", "input": "context"}


class NotedRow(Mapping[str, Any]):
    """A row that notes which of its fields are read."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self.read: set[str] = set()

    def __getitem__(self, field: str) -> Any:
        value = self.row[field]
        self.read.add(field)
        return value

    def __contains__(self, field: object) -> bool:
        return field in self.row

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)


class Columns:
    """The columns of a format in the rows of one file.

    Args:
        fields: for each column the field that holds it, or a pattern over several.
        mapped: the columns whose fields the user named; the others may have another name in some rows.
    """

    def __init__(self, fields: Mapping[str, str | Pattern], *, mapped: Collection[str] = ()) -> None:
        self._fields = fields
        self._mapped = frozenset(mapped)

    def has(self, row: Mapping[str, Any], column: str) -> bool:
        """Return whether the row holds something in an optional column."""
        field = self._field(row, column)
        if isinstance(field, Pattern):
            return all(each in row for each in field.fields)
        return not is_blank(_peek(row, field))

    def has_text(self, row: Mapping[str, Any], column: str) -> bool:
        """Return whether the row holds text in an optional column; this does not count as reading it."""
        field = self._field(row, column)
        return self.has(row, column) and (isinstance(field, Pattern) or isinstance(_peek(row, field), str))

    def is_mapped(self, column: str) -> bool:
        """Return whether the user named the field of a column."""
        return column in self._mapped

    def number(self, row: Mapping[str, Any], column: str) -> float:
        """Return the number in a column, which may be spelled out as text.

        Raises:
            BadRow: it is missing, or no finite number.
        """
        value = self.value(row, column)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise BadRow(f'the field "{self.title(column)}" must be a number, not {value!r}')
        return number

    def optional_text(self, row: Mapping[str, Any], column: str) -> str:
        """Return the text of an optional column, empty where the row holds nothing in it.

        Raises:
            BadRow: what it holds is not text.
        """
        return self.text(row, column) if self.has(row, column) else ""

    def _field(self, row: Mapping[str, Any], column: str) -> str | Pattern:
        field, other = self._fields.get(column, column), _SYNONYMS.get(column)
        if other is None or column in self._mapped or not is_blank(_peek(row, field)) or is_blank(_peek(row, other)):
            return field
        return other

    def title(self, column: str) -> str:
        """Return what the user calls a column: its field, or the pattern for it."""
        field = self._fields.get(column, column)
        return field.text if isinstance(field, Pattern) else field

    def value(self, row: Mapping[str, Any], column: str) -> Any:
        """Return what a column holds, of any type.

        Raises:
            BadRow: the field, or a key of a pattern, is missing.
        """
        field = self._field(row, column)
        if isinstance(field, Pattern):
            return field.fill(row)
        if field not in row:
            raise BadRow(f'no field "{field}"; {fields_seen(row)}{nearest(field, row)}')
        return row[field]

    def text(self, row: Mapping[str, Any], column: str, *, may_be_empty: bool = True) -> str:
        """Return the text of a column.

        Raises:
            BadRow: it is missing, not text, or empty where it must not be.
        """
        value = self.value(row, column)
        if isinstance(self._fields.get(column), Pattern) and isinstance(value, int | float):
            value = value if isinstance(value, bool) else str(value)
        text = require_text(value, self.title(column))
        if not may_be_empty and not text.strip():
            raise BadRow(f'the field "{self.title(column)}" is empty')
        return text


def _peek(row: Mapping[str, Any], field: str) -> Any:
    """Return what a field holds without counting it as read."""
    return (row.row if isinstance(row, NotedRow) else row).get(field)


def is_blank(value: Any) -> bool:
    """Return whether a field's value holds nothing: null, blank text, or an empty list or object, also of nulls."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or (isinstance(value, list | dict) and not without_nulls(value))
