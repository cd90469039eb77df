"""Read JSON Lines with the place of every row, so that a damaged one can be named."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from automodel.types import UserError


class Row(NamedTuple):
    """One row and where it stands, as ``file:line``."""

    place: str
    fields: dict[str, Any]


class BadRow(ValueError):
    """What is wrong with one row; the reader of rows adds its place."""


MAX_PROBLEMS = 5
"""How many damaged rows are named before the rest is only counted."""


def local_files(path: str) -> list[Path]:
    """Return the files that a path, a folder (its ``*.jsonl``) or a glob names, sorted."""
    folder = Path(path).expanduser()
    if folder.is_file():
        return [folder]
    if folder.is_dir():
        return sorted(file for file in folder.glob("*.jsonl") if file.is_file())
    return sorted(Path(name) for name in glob.glob(str(folder)) if Path(name).is_file())


def read_jsonl(files: list[Path]) -> Iterator[Row | tuple[str, BadRow]]:
    """Yield every row of ``files``; a damaged one as its place and what is wrong. Blank lines are passed over.

    Raises:
        UserError: a file cannot be opened.
    """
    for file in files:
        with _opened(file) as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                place = f"{file}:{number}"
                try:
                    yield Row(place, _parse(line))
                except BadRow as error:
                    yield place, error


def require_text(value: Any, name: str) -> str:
    """Return ``value`` if it is text that a tokenizer can take.

    Raises:
        BadRow: it is not a string, or holds NUL or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise BadRow(f'the field "{name}" must be text, not {_kind(value)}')
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


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # Python refuses whole numbers of thousands of digits
        raise BadRow(f"not usable: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise BadRow("not usable: nested too deeply") from None
    if not isinstance(fields, dict):
        raise BadRow(f"a row must be a JSON object, not {_kind(fields)}")
    return fields


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
