"""Mark the contents of a conversation before it is rendered, and find the marks' places in the real rendering."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

# Noncharacters, which Unicode keeps for a program's own use, around the number of what is marked.
_BEGIN, _END, _CLOSE = "\ufdd2", "\ufdd3", "\ufdd4"
_MARKER = re.compile(f"([{_BEGIN}{_END}])(\\d+){_CLOSE}")


class Place(NamedTuple):
    """Where the markers of a message stand in the real text; ``start`` is None where its marker was dropped."""

    number: int
    start: int | None
    end: int


def with_markers(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the turns with every content and name of a called function marked, and whose each marker is."""
    owners: list[int] = []

    def mark(text: str, index: int) -> str:
        owners.append(index)
        number = len(owners) - 1
        return f"{_BEGIN}{number}{_CLOSE}{text}{_END}{number}{_CLOSE}"

    marked = []
    for index, turn in enumerate(turns):
        copy = dict(turn)
        if turn["content"].strip():
            copy["content"] = mark(turn["content"], index)
        if turn.get("tool_calls"):
            copy["tool_calls"] = [
                call | {"function": call["function"] | {"name": mark(call["function"]["name"], index)}}
                for call in turn["tool_calls"]
            ]
        marked.append(copy)
    return marked, owners


def find_places(text: str, marked: str, owners: list[int], *, num_turns: int) -> list[list[Place]] | None:
    """Return the places of each message's markers in ``text``, in their order there; None: they are not certain.

    Proved by putting ``text`` together from the pieces between the markers.

    Args:
        marked: the rendering of the turns with markers.
        owners: for each marker the index of its turn.
    """
    parts = _MARKER.split(marked)  # piece, kind, number, piece, kind, number, ... piece
    ends = _match_pieces(text, parts)
    if ends is None:
        return None
    starts: dict[int, int] = {}
    places: list[list[Place]] = [[] for _ in range(num_turns)]
    for place, kind, number in zip(ends, parts[1::3], map(int, parts[2::3]), strict=False):
        if kind == _BEGIN:
            starts.setdefault(number, place)
        else:
            places[owners[number]].append(Place(number, starts.get(number), place))
    return [sorted(found, key=lambda place: place.end) for found in places]


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
    """Return what a marked rendering holds after what is marked with ``number``, without markers."""
    return _MARKER.sub("", marked.rpartition(f"{_END}{number}{_CLOSE}")[2])
