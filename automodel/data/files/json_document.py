"""Walk the items of a JSON array one by one, so that each has its place in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

ROW_LIST_NAMES = ("data", "rows", "examples")
"""Where the rows of a file that is one JSON object are looked for."""

_SPACE = re.compile(r"[ \t\r\n]*")
_raw_decode = json.JSONDecoder().raw_decode


class DamagedDocument(ValueError):
    """What is wrong with the text, and where; nothing behind that can be read."""

    def __init__(self, what: str, text: str, at: int) -> None:
        super().__init__(what)
        self.line = text.count("\n", 0, at) + 1
        self.column = at - text.rfind("\n", 0, at)


class Item(NamedTuple):
    """One item of the array: its place as ``line``, or ``line:column`` where others precede it on that line."""

    place: str
    value: Any
    end: int
    """The index behind the item."""
    num_lines: int
    """The number of line ends before ``end``."""


def walk_items(text: str, *, end: int = 0, num_lines: int = 0) -> Iterator[Item]:
    """Yield the items of the array that ``text`` is, or that an object holds under one of ``ROW_LIST_NAMES``.

    Args:
        end: the same for the place after an item, as is ``num_lines``.

    Raises:
        DamagedDocument: after the items before the damage.
    """
    is_first, at = not end, end
    if is_first:
        at, in_object = _array_start(text)
        num_lines = text.count("\n", 0, at)
    else:
        in_object = text[_skip(text, 0)] == "{"
    line_start = text.rfind("\n", 0, at) + 1
    while True:
        begin = _item_start(text, at, is_first=is_first)
        if begin is None:
            break
        num_lines += text.count("\n", at, begin)
        line_start = max(line_start, text.rfind("\n", at, begin) + 1)
        place = str(num_lines + 1)
        if begin - line_start > 200 or text[line_start:begin].strip(" \t\r,["):
            place += f":{begin - line_start + 1}"
        value, at = _decode(text, begin)
        num_lines += text.count("\n", begin, at)
        line_start = max(line_start, text.rfind("\n", begin, at) + 1)
        is_first = False
        yield Item(place, value, at, num_lines)
    behind = _skip(text, _skip(text, at) + 1)
    if not in_object and behind < len(text):
        raise DamagedDocument(
            "the file continues after the end of its array; write one array, or one row per line", text, behind
        )


def _array_start(text: str) -> tuple[int, bool]:
    """Return the index behind the bracket that opens the rows, and whether an object holds them."""
    at = _skip(text, 0)
    if text[at] == "[":
        return at + 1, False
    starts = {}
    while True:
        at = _skip(text, at + 1)  # behind the opening brace, or a comma
        if text[at : at + 1] == "}" and not starts:
            break
        name, colon = _decode(text, at)
        colon = _skip(text, colon)
        if not isinstance(name, str) or text[colon : colon + 1] != ":":
            raise DamagedDocument("not JSON: Expecting a name in double quotes and a colon", text, at)
        at = _skip(text, colon + 1)
        starts[name] = at
        at = _skip(text, _decode(text, at)[1])
        if text[at : at + 1] == "}":
            break
        _require_comma(text, at, closing="}")
    behind = _skip(text, at + 1)
    if behind < len(text):
        raise DamagedDocument("holds objects over several lines; write each on one line: jq -c . FILE", text, behind)
    lists = [start for name, start in starts.items() if name in ROW_LIST_NAMES and text[start] == "["]
    if len(lists) != 1:
        names = ", ".join(ROW_LIST_NAMES)
        problem = f"is one JSON object without a list of rows under exactly one of {names}"
        raise DamagedDocument(f"{problem}; write an array of rows, or one row a line", text, 0)
    return lists[0] + 1, True


def _item_start(text: str, at: int, *, is_first: bool) -> int | None:
    """Return where the item behind ``at`` begins, None if the array ends there."""
    at = _skip(text, at)
    if text[at : at + 1] == "]":
        return None
    if is_first:
        return at
    _require_comma(text, at, closing="]")
    begin = _skip(text, at + 1)
    if text[begin : begin + 1] == "]":
        raise DamagedDocument("not JSON: a comma stands before the end of the array; remove it", text, at)
    return begin


def _require_comma(text: str, at: int, *, closing: str) -> None:
    if at == len(text):
        raise DamagedDocument(f"the file ends before the closing {closing}; is it complete?", text, at)
    if text[at] != ",":
        raise DamagedDocument(f"not JSON: Expecting ',' or '{closing}'", text, at)


def _decode(text: str, at: int) -> tuple[Any, int]:
    try:
        return _raw_decode(text, at)
    except json.JSONDecodeError as error:
        hint = "; the file ends here, is it complete?" if error.pos >= len(text.rstrip()) else ""
        raise DamagedDocument(f"not JSON: {error.msg.removesuffix(' at')}{hint}", text, error.pos) from None
    except RecursionError:
        raise DamagedDocument("not usable: nested too deeply", text, at) from None
    except ValueError as error:  # Python refuses whole numbers of thousands of digits
        raise DamagedDocument(f"not usable: {str(error).partition(';')[0]}", text, at) from None


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()
