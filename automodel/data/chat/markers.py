"""Mark the parts of a conversation before it is rendered, and find the marks' places in the real rendering."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

# Noncharacters, which Unicode keeps for a program's own use, around the number of what is marked.
_BEGIN, _END, _CLOSE = "\ufdd2", "\ufdd3", "\ufdd4"
_MARKER = re.compile(f"([{_BEGIN}{_END}])(\\d+){_CLOSE}")

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message holds its thought."""


class Part(NamedTuple):
    """A part of a message that a template should write."""

    message: int
    kind: Literal["content", "thought", "name", "arguments", "argument"]
    text: str


class Occurrence(NamedTuple):
    """Where a part occurs in the real text; ``start`` is None where its marker was dropped.

    Attributes:
        written: what the template wrote between the markers, or since what it wrote before where one was dropped.
        is_quoted: whether quotation marks are around it.
    """

    start: int | None
    end: int
    written: str
    is_quoted: bool


class Marked(NamedTuple):
    """Turns with markers.

    Attributes:
        parts: what is marked, by the number of its markers.
        loose: parts without markers.
    """

    turns: list[dict[str, Any]]
    parts: list[Part]
    loose: list[Part]


def with_markers(turns: list[dict[str, Any]], *, arguments: Literal["all", "values", "none"]) -> Marked:
    """Return the turns with every part marked.

    Args:
        arguments: what of the arguments of calls is marked, if they are objects: their names and values, ...
    """
    parts: list[Part] = []
    loose: list[Part] = []

    def mark(text: str, index: int, kind: Any, *, is_loose: bool = False) -> str:
        if not text.strip():
            return text
        (loose if is_loose else parts).append(Part(index, kind, text))
        number = len(parts) - 1
        return text if is_loose else f"{_BEGIN}{number}{_CLOSE}{text}{_END}{number}{_CLOSE}"

    def mark_argument(value: Any, index: int) -> Any:
        if isinstance(value, dict):
            return {
                mark(name, index, "argument", is_loose=arguments != "all"): mark_argument(each, index)
                for name, each in value.items()
            }
        if isinstance(value, list):
            return [mark_argument(each, index) for each in value]
        return mark(value, index, "argument", is_loose=arguments == "none") if isinstance(value, str) else value

    def mark_call(call: dict[str, Any], index: int) -> dict[str, Any]:
        name, given = call["function"]["name"], call["function"]["arguments"]
        is_text = isinstance(given, str)
        return call | {
            "function": {
                "name": mark(name, index, "name"),
                "arguments": mark(given, index, "arguments") if is_text else mark_argument(given, index),
            }
        }

    marked = []
    for index, turn in enumerate(turns):
        copy = dict(turn)
        for key in THOUGHT_KEYS:
            if isinstance(turn.get(key), str):
                copy[key] = mark(turn[key], index, "thought")
        copy["content"] = mark(turn["content"], index, "content")
        if turn.get("tool_calls"):
            copy["tool_calls"] = [mark_call(call, index) for call in turn["tool_calls"]]
        marked.append(copy)
    return Marked(marked, parts, loose)


def find_occurrences(text: str, marked: str, num_parts: int) -> list[list[Occurrence]] | None:
    """Return the occurrences of each part in ``text``, in their order there; None: they are not certain.

    Proved by putting ``text`` together from the pieces between the markers.

    Args:
        marked: the rendering of the turns with markers.
    """
    pieces = _MARKER.split(marked)  # piece, kind, number, piece, kind, number, ... piece
    ends = _match_pieces(text, pieces)
    if ends is None:
        return None
    plain = "".join(pieces[::3])
    begun: dict[int, tuple[int, int]] = {}
    found: list[list[Occurrence]] = [[] for _ in range(num_parts)]
    at = last_end = 0
    for piece, end, kind, number in zip(pieces[::3], ends, pieces[1::3], map(int, pieces[2::3]), strict=False):
        at += len(piece)
        if kind == _BEGIN:
            begun[number] = (end, at)
        else:
            start, since = begun.pop(number, (None, last_end))
            is_quoted = plain[since - 1 : since] == plain[at : at + 1] == '"'
            found[number].append(Occurrence(start, end, plain[since:at], is_quoted))
            last_end = at
    return found


def _match_pieces(text: str, parts: list[str]) -> list[int] | None:
    """Return where each piece between markers ends in ``text``; None: the pieces do not make up ``text``.

    Next to a marker a piece may have lost its outer white space: the template has trimmed the content.
    """
    pieces = parts[::3]
    came_from: list[dict[int, int]] = [{0: 0}]  # for each piece: an end in the text -> the end of the piece before
    for n, piece in enumerate(pieces):
        follows_begin = n > 0 and parts[3 * n - 2] == _BEGIN
        precedes_end = n + 1 < len(pieces) and parts[3 * n + 1] == _END
        left = dict.fromkeys((piece, piece.lstrip("\n"), piece.lstrip())) if follows_begin else {piece: None}
        wanted = dict.fromkeys(
            each for p in left for each in ((p, p.rstrip("\n"), p.rstrip()) if precedes_end else (p,))
        )
        reached: dict[int, int] = {}
        for position in came_from[-1]:
            for each in wanted:
                if text.startswith(each, position):
                    reached.setdefault(position + len(each), position)
        came_from.append(reached)
    if len(text) not in came_from[-1]:
        return None
    ends, position = [], len(text)
    for reached in reversed(came_from[1:]):
        ends.append(position)
        position = reached[position]
    return ends[::-1]


def text_after(marked: str, number: int) -> str:
    """Return what a marked rendering holds after the part marked with ``number``, without markers."""
    return _MARKER.sub("", marked.rpartition(f"{_END}{number}{_CLOSE}")[2])
