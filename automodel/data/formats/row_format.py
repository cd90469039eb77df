"""A row format: which columns a row must have, how a file of such rows is recognised, and what is read from a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from automodel.data.formats.columns import Columns, NotedRow, is_blank


class RowFormat(Protocol):
    """What a format of rows says of itself.

    A format of your own inherits from it; ``dataset.format=my_module.MyFormat`` uses it. It needs ``required``,
    ``sample`` and ``read``. It is made without arguments, in every process that prepares rows.

    Attributes:
        name: what ``dataset.format`` calls a shipped format.
        sample: the type that ``read`` returns. A task says which types it takes.
        required: the columns that every row has; ``optional`` ones may be missing or empty.
        aliases: other fields that hold required columns where the usual ones are missing: a name, or a pattern such as
            ``{title}\\n{description}``.
        likely: fields that often hold a column under a name which alone does not prove it; proposed to the user.
        is_rendered: a chat template renders the rows.
        is_exclusive: a row with the required columns has no other format, even if it holds more.
        recipe: the recipe that trains on such rows.
    """

    name: str = ""
    sample: type
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    aliases: tuple[Mapping[str, str], ...] = ()
    likely: Mapping[str, tuple[str, ...]] = {}
    is_rendered: bool = False
    is_exclusive: bool = False
    recipe: str = "llm_sft"

    def read(self, columns: Columns, row: Mapping[str, Any]) -> Any:
        """Return the sample that a row holds.

        Raises:
            BadRow: a field is missing, of the wrong type, or empty where it must not be.
        """
        ...

    def suits(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row with the required columns may be taken for this format without the user saying so."""
        return True

    def doubt(self, row: Mapping[str, Any]) -> str | None:
        """Return why the user must confirm the format of such rows, or None; asked once the format is recognised."""
        return None

    def advice(self) -> str:
        """Return who trains on such rows, for a user whose recipe does not."""
        return f"recipe={self.recipe} trains on rows of this format ({self.name})"


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one file.

    Attributes:
        name: of the format, as ``dataset.format`` calls it.
    """

    name: str
    format: RowFormat
    columns: Columns

    def read(self, row: Mapping[str, Any]) -> Any:
        """Return the sample that a row holds; raises BadRow as the format does."""
        return self.format.read(self.columns, row)

    def read_with_rest(self, row: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """Return the sample, and the names of the fields that hold something and were not read for it.

        Raises:
            BadRow: as the format does.
        """
        noted = NotedRow(row)
        sample = self.read(noted)
        return sample, [field for field, value in row.items() if field not in noted.read and not is_blank(value)]
