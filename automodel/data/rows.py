"""A row and where it came from, or what is wrong with it."""

from __future__ import annotations

from datetime import date, datetime, time
from typing import Any, NamedTuple

from automodel.types import UserError

MAX_PROBLEMS = 5
"""How many damaged rows are named before the rest is only counted."""


class Row(NamedTuple):
    """One row and where it stands: ``file:line``, or ``file:row N`` in a file without lines."""

    place: str
    fields: dict[str, Any]


class BadRow(ValueError):
    """What is wrong with one row; the reader of rows adds its place."""


class Position(NamedTuple):
    """Where the next row begins: three plain numbers, to be saved with a run.

    ``offset`` counts bytes of the unpacked file, in a JSON document characters, in Parquet rows; ``line`` is the
    number of lines before it.
    """

    file: int = 0
    offset: int = 0
    line: int = 0


ReadRow = Row | tuple[str, BadRow]


def require_text(value: Any, name: str) -> str:
    """Return ``value`` if it is text that a tokenizer can take.

    Raises:
        BadRow: it is not a string, or holds NUL or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise BadRow(f'the field "{name}" must be text, not {type_in_words(value)}')
    if "\x00" in value:
        raise BadRow(f'the field "{name}" holds a NUL character')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f'the field "{name}" holds half of a surrogate pair, which is not valid text') from None
    return value


def raise_problems(problems: list[str], num_problems: int) -> None:
    """Raise the problems collected, if any, saying how many more there are."""
    if num_problems > len(problems):
        problems = [*problems, f"... and {num_problems - len(problems)} more damaged rows"]
    if problems:
        raise UserError(*problems)


def type_in_words(value: Any) -> str:
    if isinstance(value, float) and value != value:
        return "NaN (a missing number)"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    others = {bytes: "bytes", datetime: "a date", date: "a date", time: "a time"}
    return (names | others).get(type(value), "a number")
