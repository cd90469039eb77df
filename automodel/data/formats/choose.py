"""Recognise the format of a file from the fields of its first row, or find the one that the user names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from automodel.config.names import did_you_mean
from automodel.data.formats.alpaca import AlpacaFormat
from automodel.data.formats.columns import Columns
from automodel.data.formats.messages import MessagesFormat, ShareGPTFormat
from automodel.data.formats.patterns import Pattern, fields_seen, nearest, read_pattern, whole_field
from automodel.data.formats.preference import PreferenceFormat
from automodel.data.formats.prompt_completion import PromptCompletionFormat
from automodel.data.formats.row_format import RowFormat, RowReader
from automodel.data.formats.text import TextFormat
from automodel.data.formats.text_label import TextLabelFormat
from automodel.data.rows import BadRow, ReadRow
from automodel.types import UserError

SHIPPED: tuple[RowFormat, ...] = (
    MessagesFormat(),
    ShareGPTFormat(),
    PromptCompletionFormat(),
    AlpacaFormat(),
    TextFormat(),
    TextLabelFormat(),
    PreferenceFormat(),
)
"""The formats that are recognised, in the order in which messages list them."""

_NUM_FIRST_ROWS = 1000
"""Rows among which a field is looked for that the user names and the first row lacks."""


class UnknownFormat(BadRow):
    """The format of a whole file is not known; naming every row would repeat it again and again."""


def find_format(name: str) -> RowFormat:
    """Return the format that ``dataset.format`` names: a shipped one, or a class of the user's by its dotted path.

    Raises:
        ValueError: there is no such format; the message says what ``name`` must be.
    """
    for each in SHIPPED:
        if each.name == name:
            return each
    module, _, attribute = name.rpartition(".")
    if not module:
        names = ["auto", *(each.name for each in SHIPPED)]
        raise ValueError(
            f"one of {', '.join(names)}, or a class of your own, as my_module.MyFormat{did_you_mean(name, names)}"
        )
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:
        raise ValueError(f"a class that can be imported; {type(error).__name__}: {error}") from None
    if not isinstance(found, type) or RowFormat not in found.__mro__:
        raise ValueError(f"a class that inherits from {RowFormat.__module__}.RowFormat")
    return found()


def _require_format(name: str) -> str:
    try:
        if name != "auto":
            find_format(name)
    except ValueError as error:
        raise PydanticCustomError("unknown_format", "{what}", {"what": str(error)}) from None
    return name


FormatName = Annotated[str, AfterValidator(_require_format)]
"""What ``dataset.format`` takes."""


def choose_for_file(
    rows: Iterable[ReadRow], name: str, columns: Mapping[str, str | None], *, samples: Collection[type]
) -> RowReader | None:
    """Return the reader for a file, by the first of its ``rows`` that is not damaged; None where there is no such row.

    A field that the user names may be missing from that row, if another of the first rows holds it.

    Raises:
        UserError: as ``choose_format``, with the place of the row.
    """
    rows = iter(rows)
    for place, fields in rows:
        if isinstance(fields, BadRow):
            continue
        try:
            fields = fields | _held_later(rows, _missing_fields(columns, fields))
            return choose_format(name, columns, row=fields, samples=samples)
        except UnknownFormat as error:
            raise UserError(f"{place}: {error}") from error
    return None


def choose_format(
    name: str, columns: Mapping[str, str | None], *, row: Mapping[str, Any], samples: Collection[type]
) -> RowReader:
    """Return the reader for rows like ``row``, by the format's name or, with ``auto``, by the fields of ``row``.

    Args:
        columns: for a column of a format the field that holds it, or a pattern over fields such as
            ``{context}\\n\\n{question}`` or ``{answers[text][0]}``.
        samples: the types of sample that the recipe's task takes.

    Raises:
        UnknownFormat: the fields suit no known format, or several; the message names the key that settles it.
    """
    mapped = {column: _mapped(column, field, row) for column, field in columns.items() if field is not None}
    candidates = [each for each in SHIPPED if each.sample in samples]
    chosen = _detected(candidates, mapped, row) if name == "auto" else _named(name, candidates, samples)
    fields = _fields_of(chosen, mapped, row)
    return RowReader(chosen.name if name == "auto" else name, chosen, Columns(fields, mapped=mapped))


def _named(name: str, candidates: Sequence[RowFormat], samples: Collection[type]) -> RowFormat:
    try:
        chosen = find_format(name)
    except ValueError as error:
        raise UnknownFormat(f"dataset.format={name} must be {error}") from None
    if chosen.sample not in samples:
        takes = " or ".join(each.name for each in candidates) or "a format of your own"
        advice = f"; {chosen.advice()}" if chosen in SHIPPED else f", not one that reads {chosen.sample.__name__}"
        raise UnknownFormat(f"dataset.format={name} does not suit this recipe; it takes {takes}{advice}")
    return chosen


def _detected(candidates: Sequence[RowFormat], mapped: Mapping[str, Any], row: Mapping[str, Any]) -> RowFormat:
    others = [each for each in SHIPPED if each not in candidates and _has_required(each, mapped, row)]
    for other in others:
        if other.is_exclusive and not mapped:
            raise UnknownFormat(other.advice())
    fits = [each for each in candidates if _has_required(each, mapped, row)]
    if len(fits) == 1:
        doubt = None if mapped else fits[0].doubt(row)
        if doubt is not None:
            raise UnknownFormat(doubt)
        return fits[0]
    if fits:
        names = " or ".join(each.name for each in fits)
        raise UnknownFormat(f"the {fields_seen(row)} suit several formats; choose dataset.format={names}")
    if others:
        raise UnknownFormat(
            f"the {fields_seen(row)} do not suit this recipe; {others[0].advice()}; or name "
            "the fields to train on here with dataset.columns.*"
        )
    wanted = "; ".join(f"{each.name}: {', '.join(each.required + each.optional)}" for each in candidates)
    raise UnknownFormat(
        f"the {fields_seen(row)} are of no known format; name them with dataset.columns.* ({wanted})"
        f"{_likely_columns(candidates, row)}"
    )


def _has_required(row_format: RowFormat, mapped: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Return whether a row, with the columns that the user maps, has all that a format needs."""
    if not set(mapped) <= {*row_format.required, *row_format.optional}:
        return False
    fields = _fields_of(row_format, mapped, row)
    has_all = all(isinstance(fields[each], Pattern) or fields[each] in row for each in row_format.required)
    return has_all and (bool(mapped) or row_format.suits(row))


def _likely_columns(candidates: Sequence[RowFormat], row: Mapping[str, Any]) -> str:
    """Return the keys that probably name the fields of a row, as the end of a message."""
    for each in candidates:
        found = {column: next((name for name in names if name in row), None) for column, names in each.likely.items()}
        if found and all(found.values()):
            keys = " ".join(f"dataset.columns.{column}={field}" for column, field in found.items())
            return f"; perhaps {keys}"
    return ""


def _fields_of(row_format: RowFormat, mapped: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str | Pattern]:
    """Return the field of every column: the user's, or that of the first alias that the row has, or the usual one."""
    fields = {column: column for column in row_format.required + row_format.optional} | dict(mapped)
    for alias in row_format.aliases:
        is_usual = all(fields[column] in row for column in alias if column not in mapped)
        read = {column: read_pattern(field) if "{" in field else field for column, field in alias.items()}
        if not is_usual and all(_is_there(field, row) for column, field in read.items() if column not in mapped):
            return fields | read | dict(mapped)
    return fields


def _is_there(field: str | Pattern, row: Mapping[str, Any]) -> bool:
    return all(each in row for each in field.fields) if isinstance(field, Pattern) else field in row


def _held_later(rows: Iterator[ReadRow], missing: Collection[str]) -> dict[str, None]:
    """Return those of the missing fields that one of the next rows has."""
    found: set[str] = set()
    for _, fields in islice(rows, _NUM_FIRST_ROWS if missing else 0):
        found |= {field for field in missing if not isinstance(fields, BadRow) and field in fields}
        if len(found) == len(missing):
            break
    return dict.fromkeys(found)


def _missing_fields(columns: Mapping[str, str | None], row: Mapping[str, Any]) -> set[str]:
    """Return the fields that ``columns`` refers to and a row does not have."""
    named = {column: field for column, field in columns.items() if field is not None}
    return {each for column, field in named.items() for each in _pattern(column, field, row).fields if each not in row}


def _mapped(column: str, field: str, row: Mapping[str, Any]) -> str | Pattern:
    pattern = _pattern(column, field, row)
    for each in pattern.fields:
        if each not in row:
            named = f"dataset.columns.{column}" + ("" if each == field else f"={field}")
            raise UnknownFormat(f'no field "{each}" ({named}); {fields_seen(row)}{nearest(each, row)}')
    return field if pattern.fields == [field] else pattern


def _pattern(column: str, field: str, row: Mapping[str, Any]) -> Pattern:
    """Return the pattern that a user's ``field`` is; the name of a field may hold braces."""
    if field in row or not any(brace in field for brace in "{}"):
        return whole_field(field)
    try:
        return read_pattern(field)
    except ValueError as error:
        raise UnknownFormat(f"dataset.columns.{column}={field} is no pattern: {error}") from None
