"""Read rows of a chosen and a rejected answer, with the prompt named, or found as what both conversations share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from automodel.data.formats.turns import Turn, read_tools, read_turn, read_turns, with_system
from automodel.data.rows import BadRow, require_text


class Preference(NamedTuple):
    """A prompt with an answer that was preferred and one that was not; none of the three is empty."""

    prompt: list[Turn]
    chosen: list[Turn]
    rejected: list[Turn]
    tools: list[dict[str, Any]] | None = None


class _Columns(Protocol):
    def has(self, row: Mapping[str, Any], column: str) -> bool: ...

    def title(self, column: str) -> str: ...

    def value(self, row: Mapping[str, Any], column: str) -> Any: ...

    def text(self, row: Mapping[str, Any], column: str) -> str: ...


def read_preference(fields: _Columns, row: Mapping[str, Any]) -> Preference:
    """Bring a row to a pair; an answer is text, one message, or messages that may hold the prompt as well.

    Raises:
        BadRow: a field cannot be read, or where the prompt ends cannot be told.
    """
    chosen, rejected = (_read_side(fields, row, column) for column in ("chosen", "rejected"))
    prompt = _read_prompt(fields, row)
    if _is_answer(chosen) and _is_answer(rejected):
        if not prompt:
            raise BadRow("no prompt before the chosen and the rejected answer; name it with dataset.columns.prompt")
    else:
        alike = [one == other for one, other in zip(chosen[:-1], rejected[:-1], strict=False)]
        num_shared = alike.index(False) if False in alike else len(alike)
        shared = chosen[:num_shared]
        if not shared or not _is_answer(chosen[num_shared:]) or not _is_answer(rejected[num_shared:]):
            raise BadRow("chosen and rejected do not begin with the same prompt, followed by two answers")
        if prompt and prompt[-1]["content"] not in [turn["content"] for turn in shared]:
            raise BadRow("the prompt is not the one with which chosen and rejected begin; drop one of them")
        prompt, chosen, rejected = shared, chosen[num_shared:], rejected[num_shared:]
    system = fields.text(row, "system") if fields.has(row, "system") else ""
    tools = read_tools(fields.value(row, "tools")) if fields.has(row, "tools") else None
    return Preference(with_system(prompt, None, system)[0], chosen, rejected, tools)


def _read_side(fields: _Columns, row: Mapping[str, Any], column: str) -> list[Turn]:
    value = fields.value(row, column)
    name = fields.title(column)
    if isinstance(value, list):
        return read_turns(value, name)[0]
    if isinstance(value, dict):
        return [read_turn(value, name)]
    return [read_turn({"role": "assistant", "content": require_text(value, name)}, name)]


def _read_prompt(fields: _Columns, row: Mapping[str, Any]) -> list[Turn]:
    given = [column for column in ("prompt", "messages", "conversations") if fields.has(row, column)]
    if len(given) > 1:
        raise BadRow(f"{' and '.join(given)} all hold a prompt; name one of them with dataset.columns.prompt")
    if not given:
        return []
    value = fields.value(row, given[0])
    if isinstance(value, list):
        return read_turns(value, fields.title(given[0]))[0]
    return [{"role": "user", "content": fields.text(row, given[0])}]


def _is_answer(turns: list[Turn]) -> bool:
    return bool(turns) and turns[0]["role"] == "assistant"
