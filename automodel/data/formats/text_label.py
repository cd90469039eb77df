"""Rows of a text and the label of its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel.data.formats.columns import Columns
from automodel.data.formats.row_format import RowFormat
from automodel.data.formats.samples import TextLabel
from automodel.data.rows import BadRow, require_text


class TextLabelFormat(RowFormat):
    """A text with one label: a name, a whole number, or true and false."""

    name = "text_label"
    sample = TextLabel
    required = ("text", "label")
    aliases = ({"text": "sentence"}, {"text": "{title}\n{description}"})
    likely: Mapping[str, tuple[str, ...]] = {
        "text": ("text", "sentence", "content", "review", "question", "document", "body"),
        "label": ("label", "labels", "class", "category", "target", "sentiment", "intent"),
    }
    recipe = "llm_seq_cls"

    def read(self, columns: Columns, row: Mapping[str, Any]) -> TextLabel:
        title = columns.title("label")
        label = _label(columns.value(row, "label"), f'the field "{title}"')
        return TextLabel(columns.text(row, "text", may_be_empty=False), require_text(label, title))


def _label(label: Any, what: str) -> str:
    """Return the name of a class: text as it is, true and false in lower case, a whole number without a fraction."""
    if isinstance(label, list):
        raise BadRow(
            f"{what} is a list of labels; a classifier learns one label a row, several (multi-label) are not read"
        )
    if label is None or label == "" or label != label:
        raise BadRow(f"{what} is empty: the row has no label; leave such rows out")
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float):
        if not label.is_integer():
            raise BadRow(f"{what} is {label:g}: a score is not a class; give each class a whole number or a name")
        return str(int(label))
    if not isinstance(label, int | str):
        raise BadRow(f"{what} must be a whole number, true or false, or a name")
    return str(label)
