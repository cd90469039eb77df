"""Rows of an instruction, perhaps with an input, and the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from automodel.data.formats.columns import Columns
from automodel.data.formats.row_format import RowFormat
from automodel.data.formats.samples import Messages
from automodel.data.formats.turns import with_system
from automodel.data.rows import BadRow


class AlpacaFormat(RowFormat):
    """One turn of the user and one of the assistant, as Stanford Alpaca (Taori et al. 2023) lays them out."""

    name = "alpaca"
    sample = Messages
    required = ("instruction", "output")
    optional = ("input", "system")
    aliases = ({"output": "response"},)
    is_rendered = True

    def read(self, columns: Columns, row: Mapping[str, Any]) -> Messages:
        if row.get("history"):
            raise BadRow('the field "history" is not supported; give the earlier turns as messages')
        instruction = columns.text(row, "instruction", may_be_empty=False)
        extra = columns.optional_text(row, "input")
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        answer = columns.text(row, "output", may_be_empty=False)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Messages(with_system(turns, None, columns.optional_text(row, "system"))[0])
