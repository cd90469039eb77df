"""Rows of a chosen and a rejected answer, with the prompt named, or found as what both conversations share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel.data.formats.columns import Columns
from automodel.data.formats.row_format import RowFormat
from automodel.data.formats.samples import Preference, Turn
from automodel.data.formats.turns import read_tools, read_turn, read_turns, with_system
from automodel.data.rows import BadRow, require_text


class PreferenceFormat(RowFormat):
    """A pair of answers, each as text, one message, or messages that may hold the prompt as well."""

    name = "preference"
    sample = Preference
    required = ("chosen", "rejected")
    optional = ("prompt", "messages", "conversations", "tools", "system")
    aliases = ({"chosen": "chosen_messages", "rejected": "rejected_messages"},)
    is_rendered = True
    is_exclusive = True

    def advice(self) -> str:
        return (
            "the rows are preference pairs (chosen, rejected), which no recipe trains on yet; to train on the chosen "
            "answers alone with recipe=llm_sft, map them: dataset.columns.prompt with dataset.columns.completion, or "
            "dataset.columns.messages"
        )

    def read(self, columns: Columns, row: Mapping[str, Any]) -> Preference:
        chosen, rejected = (_read_side(columns, row, column) for column in ("chosen", "rejected"))
        prompt = _read_prompt(columns, row)
        if _is_answer(chosen) and _is_answer(rejected):
            if not prompt:
                raise BadRow("no prompt before the chosen and the rejected answer; name it with dataset.columns.prompt")
        else:
            is_same = [one == other for one, other in zip(chosen[:-1], rejected[:-1], strict=False)]
            num_shared = is_same.index(False) if False in is_same else len(is_same)
            shared = chosen[:num_shared]
            if not shared or not _is_answer(chosen[num_shared:]) or not _is_answer(rejected[num_shared:]):
                raise BadRow("chosen and rejected do not begin with the same prompt, followed by two answers")
            if prompt and prompt[-1]["content"] not in [turn["content"] for turn in shared]:
                raise BadRow("the prompt is not the one with which chosen and rejected begin; drop one of them")
            prompt, chosen, rejected = shared, chosen[num_shared:], rejected[num_shared:]
        system = columns.optional_text(row, "system")
        tools = read_tools(columns.value(row, "tools")) if columns.has(row, "tools") else None
        return Preference(with_system(prompt, None, system)[0], chosen, rejected, tools)


def _read_side(columns: Columns, row: Mapping[str, Any], column: str) -> list[Turn]:
    value = columns.value(row, column)
    name = columns.title(column)
    if isinstance(value, list):
        return read_turns(value, name)[0]
    if isinstance(value, dict):
        return [read_turn(value, name)]
    return [read_turn({"role": "assistant", "content": require_text(value, name)}, name)]


def _read_prompt(columns: Columns, row: Mapping[str, Any]) -> list[Turn]:
    given = [column for column in ("prompt", "messages", "conversations") if columns.has(row, column)]
    if len(given) > 1:
        raise BadRow(f"{' and '.join(given)} all hold a prompt; name one of them with dataset.columns.prompt")
    if not given:
        return []
    value = columns.value(row, given[0])
    if isinstance(value, list):
        return read_turns(value, columns.title(given[0]))[0]
    return [{"role": "user", "content": columns.text(row, given[0])}]


def _is_answer(turns: list[Turn]) -> bool:
    return bool(turns) and turns[0]["role"] == "assistant"
