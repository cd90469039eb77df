"""Rows of text for continued pre-training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel.data.formats.columns import Columns
from automodel.data.formats.row_format import RowFormat
from automodel.data.formats.samples import PlainText

# Beside a text, these say where it is from; any other field may be what should be learned.
_PROVENANCE = {"id", "url", "source", "timestamp", "date", "meta", "metadata"}


class TextFormat(RowFormat):
    """A text, of which everything is trained on."""

    name = "text"
    sample = PlainText
    required = ("text",)

    def read(self, columns: Columns, row: Mapping[str, Any]) -> PlainText:
        return PlainText(columns.text(row, "text", may_be_empty=False))

    def suits(self, row: Mapping[str, Any]) -> bool:
        return set(row) <= {"text"} | _PROVENANCE
