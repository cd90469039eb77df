"""Take a column of a format from a row: by a field's name, or by a pattern over several, possibly nested, fields."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from automodel.data.rows import BadRow

# A field and the keys or indices within it, as in {answers[text][0]}. No attribute can be reached.
_REFERENCE = re.compile(r"(?P<field>[^\[\].!:{}]+)(?P<keys>(\[[^\[\]{}]+\])*)")
_KEY = re.compile(r"\[([^\[\]]+)\]")


class _Reference(NamedTuple):
    field: str
    keys: tuple[str, ...]


class Pattern(NamedTuple):
    """Text with references to fields in it; a single reference gives the value itself, of any type."""

    text: str
    parts: tuple[tuple[str, _Reference | None], ...]

    def fill(self, row: Mapping[str, Any]) -> Any:
        """Return the pattern's value for a row.

        Raises:
            BadRow: a field or a key is missing, or a value within a text is not text or a number.
        """
        if len(self.parts) == 1 and self.parts[0][0] == "" and self.parts[0][1] is not None:
            return self._look_up(self.parts[0][1], row)
        return "".join(
            literal + ("" if reference is None else self._text(reference, row)) for literal, reference in self.parts
        )

    @property
    def fields(self) -> list[str]:
        """The fields that the pattern refers to."""
        return [reference.field for _, reference in self.parts if reference is not None]

    def _text(self, reference: _Reference, row: Mapping[str, Any]) -> str:
        value = self._look_up(reference, row)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise BadRow(f'"{_spelt(reference)}" in the pattern "{self.text}" must be text or a number')
        return str(value)

    def _look_up(self, reference: _Reference, row: Mapping[str, Any]) -> Any:
        if reference.field not in row:
            raise BadRow(f'no field "{reference.field}" for the pattern "{self.text}"; {fields_seen(row)}')
        value = row[reference.field]
        for depth, key in enumerate(reference.keys):
            try:
                value = value[int(key)] if isinstance(value, list) else _member(value, key)
            except (KeyError, IndexError, ValueError):
                within = _spelt(_Reference(reference.field, reference.keys[:depth]))
                raise BadRow(f'no "{key}" in "{within}" for the pattern "{self.text}"') from None
        return value


def read_pattern(text: str) -> Pattern:
    r"""Read a pattern in the style of str.format; ``\n`` and ``\t`` may be spelt out, as on a command line.

    Raises:
        ValueError: it is not one; the message says why.
    """
    parts: list[tuple[str, _Reference | None]] = []
    try:
        pieces = list(string.Formatter().parse(text.replace("\\n", "\n").replace("\\t", "\t")))
    except ValueError as error:
        raise ValueError(f"{error}; double a brace that is meant as such") from None
    for literal, reference, spec, conversion in pieces:
        if reference is None:
            parts.append((literal, None))
            continue
        found = _REFERENCE.fullmatch(reference)
        if found is None or spec or conversion:
            what = reference + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{{{what}}} must be a field's name, with keys in brackets where it is nested")
        parts.append((literal, _Reference(found["field"], tuple(_KEY.findall(found["keys"])))))
    return Pattern(text, tuple(parts))


def whole_field(name: str) -> Pattern:
    """Return the pattern for the value of one field, with any name."""
    return Pattern(name, (("", _Reference(name, ())),))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a question that proposes the nearest of ``names``, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def fields_seen(row: Mapping[str, Any]) -> str:
    """Return the words that name a row's fields."""
    return f"fields: {', '.join(row) or 'none'}"


def _member(value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise KeyError(key)
    return value[key]


def _spelt(reference: _Reference) -> str:
    return reference.field + "".join(f"[{key}]" for key in reference.keys)
