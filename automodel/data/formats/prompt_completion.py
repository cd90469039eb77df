"""Rows of a prompt and its completion, as plain text without a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel.data.formats.columns import Columns
from automodel.data.formats.row_format import RowFormat
from automodel.data.formats.samples import PromptCompletion


class PromptCompletionFormat(RowFormat):
    """``prompt`` and ``completion``, perhaps with a ``system`` text and an ``input`` that belong before the prompt."""

    name = "prompt_completion"
    sample = PromptCompletion
    required = ("prompt", "completion")
    optional = ("input", "system")
    aliases = ({"prompt": "question", "completion": "answer"},)
    likely: Mapping[str, tuple[str, ...]] = {
        "prompt": ("query", "question", "prompt", "problem", "instruction", "input", "source"),
        "completion": ("response", "answer", "completion", "solution", "output", "target", "summary"),
    }

    def read(self, columns: Columns, row: Mapping[str, Any]) -> PromptCompletion:
        kind = row.get("kind")
        completion = columns.text(row, "completion", may_be_empty=False)
        prompt = columns.text(row, "prompt")
        before = [_text_before(columns, row, column) for column in ("system", "input")]
        prompt = "\n\n".join([*(text for text in before if text and text.strip() not in prompt), prompt])
        return PromptCompletion(prompt, completion, kind if isinstance(kind, str) else None)


def _text_before(columns: Columns, row: Mapping[str, Any], column: str) -> str:
    """Return an optional text that belongs before the prompt; a user who maps the prompt maps such texts too."""
    if columns.is_mapped(column):
        return columns.optional_text(row, column)
    return columns.text(row, column) if not columns.is_mapped("prompt") and columns.has_text(row, column) else ""
