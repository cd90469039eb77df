"""Prove that a chat template writes every part of every message: contents, thoughts, calls, results of tools."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from automodel.data.chat.encode import QUOTE_CLOSE, QUOTE_OPEN
from automodel.data.chat.markers import Marked, Occurrence, Part
from automodel.data.formats.samples import Messages
from automodel.data.rows import BadRow

_TAG = re.compile(r"[<\[]/?(?:think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)
"""What begins and ends a thought within a content."""
_SHOWN_CHARACTERS = 40
_QUOTES = dict.fromkeys(map(ord, (QUOTE_OPEN, QUOTE_CLOSE)))


def require_whole(
    row: Messages,
    text: str,
    marked: Marked,
    places: list[list[Occurrence]],
    render_alone: Callable[[list[dict[str, Any]]], str | None],
    *,
    is_marked: bool,
    advice: str,
) -> list[int]:
    """Refuse a rendering that leaves out, or repeats, a part of the conversation.

    The thought of a message that others follow may be missing, if the template writes it where none follows: that is
    how some templates are meant. Returns the indices of the messages that lose one.

    Args:
        text: the rendering.
        places: each marked part's places in it.
        render_alone: renders turns that are not the whole conversation.
        is_marked: the template says itself what is generated, so a part may come again.

    Raises:
        BadRow: a part is missing, or comes again where it must not.
    """
    left_out: list[int] = []
    for part, found in zip(marked.parts, places, strict=True):
        missing = _missing(part, found)
        if missing is None:
            if len(found) > 1 and _is_answer(row, part) and not is_marked:
                what = f"message {part.message + 1} (role assistant)"
                raise BadRow(f"the chat template writes {what} more than once, so its place is not certain; {advice}")
            continue
        kind, lost = missing
        is_earlier = kind == "the thought" and part.message + 1 < len(row.turns)
        if not is_earlier or not _is_written_last(row, part.message, lost, render_alone):
            raise BadRow(f"the chat template leaves out {_named(row, part, kind, lost)}; {advice}")
        left_out.append(part.message)
    written = _letters(text) if marked.loose else ""
    for part in marked.loose:
        if _letters(part.text) not in written:
            raise BadRow(f"the chat template leaves out {_named(row, part, 'the argument', part.text)}; {advice}")
    for tool in row.tools or ():
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in text:
            raise BadRow(f"the chat template leaves out the tool {name!r}; choose another dataset.chat_template")
    return sorted(set(left_out))


def _is_answer(row: Messages, part: Part) -> bool:
    return part.kind in ("content", "thought") and row.turns[part.message]["role"] == "assistant"


def _is_written_last(row: Messages, index: int, lost: str, render_alone: Callable[..., str | None]) -> bool:
    alone = render_alone(row.turns[: index + 1])
    inner = _squeezed(_TAG.sub("", lost))
    return alone is not None and inner in _squeezed(alone)


def _missing(part: Part, found: list[Occurrence]) -> tuple[str, str] | None:
    """Return what the template does not write of a part, and what kind of thing that is; None: nothing is missing."""
    if any(_is_whole(part, place) for place in found):
        return None
    if part.kind != "content":
        kinds = {"thought": "the thought", "name": "the call", "arguments": "the arguments", "argument": "the argument"}
        return kinds[part.kind], part.text
    *_, close = [None, *_TAG.finditer(part.text)]
    if close is not None and any(_is_whole(part._replace(text=part.text[close.end() :]), place) for place in found):
        return "the thought", part.text[: close.end()]
    if not found:
        return "the content", part.text
    return "a part", _rest(part.text, found[-1].written)


def _is_whole(part: Part, place: Occurrence) -> bool:
    if part.kind == "arguments":  # JSON text, which a template may take for any other text and quote
        return place.written == part.text and not place.is_quoted
    wanted, written = _squeezed(part.text), _squeezed(place.written)
    if place.start is not None and wanted != written:
        # Between its markers a content may be written otherwise: as JSON, say.
        return len(written) >= len(wanted) and _is_within(_letters(wanted), _letters(written))
    at = 0
    for piece in _TAG.split(part.text):  # a template may write the tags of a thought in its own way
        piece = _squeezed(piece)
        at = written.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def _named(row: Messages, part: Part, kind: str, lost: str) -> str:
    """Name what is left out, by message and first words."""
    message = f"message {part.message + 1} (role {row.turns[part.message]['role']})"
    if kind == "the content":
        return message
    shown = " ".join(lost.split())
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    return f"{kind} {shown!r} of {message}"


def _rest(text: str, written: str) -> str:
    """Return ``text`` without the beginning and the end that were written."""
    text, written = text.strip(), written.strip()
    start = next((i for i, (one, other) in enumerate(zip(text, written, strict=False)) if one != other), len(written))
    backwards = zip(reversed(text), reversed(written), strict=False)
    end = next((i for i, (one, other) in enumerate(backwards) if one != other), len(written))
    return text[start : max(start, len(text) - end)] or text


def _squeezed(text: str) -> str:
    return "".join(text.translate(_QUOTES).split())


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).casefold()


def _is_within(one: str, other: str) -> bool:
    """Return whether the characters of ``one`` come in their order in ``other``."""
    at = -1
    return all((at := other.find(letter, at + 1)) >= 0 for letter in one)
