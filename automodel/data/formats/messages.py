"""Rows that hold a conversation, as OpenAI or ShareGPT lay it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel.data.formats.columns import Columns
from automodel.data.formats.patterns import fields_seen
from automodel.data.formats.row_format import RowFormat
from automodel.data.formats.samples import Messages
from automodel.data.formats.turns import read_tools, read_turns, with_system
from automodel.data.rows import BadRow


class MessagesFormat(RowFormat):
    """A list of messages with role and content."""

    name = "messages"
    sample = Messages
    required: tuple[str, ...] = ("messages",)
    optional = ("tools", "system")
    is_rendered = True

    def read(self, columns: Columns, row: Mapping[str, Any]) -> Messages:
        column = self.required[0]
        turns, weights = read_turns(columns.value(row, column), columns.title(column))
        if not any(turn["role"] == "assistant" for turn in turns):
            raise BadRow("no message of the assistant: there is nothing to train on")
        turns, weights = with_system(turns, weights, columns.optional_text(row, "system"))
        return Messages(turns, read_tools(columns.value(row, "tools") if columns.has(row, "tools") else None), weights)

    def doubt(self, row: Mapping[str, Any]) -> str | None:
        if not isinstance(row.get("label"), bool):
            return None
        return (
            f"messages with a boolean label, which says whether the answer is a good one; {fields_seen(row)}; choose "
            f"dataset.format={self.name} to train on all of them, the bad ones too"
        )


class ShareGPTFormat(MessagesFormat):
    """The same under the name ``conversations``, usually with from and value."""

    name = "sharegpt"
    required = ("conversations",)
