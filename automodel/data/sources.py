"""Where rows come from: the embedded default, local files, the hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from automodel.data.formats import FormatName
from automodel.data.prepare import PrepareOptions, ReadRow
from automodel.data.readers import Row, local_files, read_jsonl
from automodel.data.tokenize import Truncation
from automodel.types import UserError


@dataclass(frozen=True)
class DemoDataset:
    """Exercises generated in code; what ``dataset=demo`` configures."""

    split: Literal["train", "validation"] = "train"
    limit: int | None = None
    max_length: int = 2048
    truncation: Truncation = "right"

    @property
    def display_name(self) -> str:
        return f"demo {self.split}"

    def rows(self, *, is_classification: bool) -> Iterable[ReadRow]:
        from automodel.data.demo import generate_demo_rows

        for number, row in enumerate(generate_demo_rows(self.split), start=1):
            fields = {"text": row["prompt"], "label": row["kind"]} if is_classification else row
            yield Row(f"{self.display_name}:{number}", fields)

    def options(self, model_max_length: int | None) -> PrepareOptions:
        return PrepareOptions(
            limit=self.limit, max_length=shorter(self.max_length, model_max_length), truncation=self.truncation
        )


@dataclass(frozen=True)
class JsonlDataset:
    """Rows of local JSON Lines files; what ``dataset=jsonl`` configures."""

    path: str
    format: FormatName = "auto"
    columns: dict[str, str | None] = field(default_factory=dict)
    limit: int | None = None
    max_length: int = 2048
    truncation: Truncation = "right"
    chat_template: str | None = None

    @property
    def display_name(self) -> str:
        return self.path

    def rows(self, *, is_classification: bool) -> Iterable[ReadRow]:
        files = local_files(self.path)
        if not files:
            raise UserError(f"dataset.path={self.path} does not exist, or holds no .jsonl file")
        return read_jsonl(files)

    def options(self, model_max_length: int | None) -> PrepareOptions:
        return PrepareOptions(
            limit=self.limit,
            max_length=shorter(self.max_length, model_max_length),
            truncation=self.truncation,
            format=self.format,
            columns=self.columns,
            chat_template=self.chat_template,
        )


@dataclass(frozen=True)
class HFDataset:
    """Rows of a data set on the hub; what ``dataset=hf`` configures."""

    path: str
    name: str | None = None
    split: str = "train"
    format: FormatName = "auto"
    columns: dict[str, str | None] = field(default_factory=dict)
    limit: int | None = None
    max_length: int = 2048
    truncation: Truncation = "right"
    chat_template: str | None = None

    @property
    def display_name(self) -> str:
        return f"{self.path}[{self.split}]"

    def rows(self, *, is_classification: bool) -> Iterable[ReadRow]:
        from datasets import load_dataset

        try:
            rows: Any = load_dataset(self.path, self.name, split=self.split)
        except (OSError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"dataset.path={self.path} cannot be loaded: {first}") from error
        return (Row(f"{self.display_name}:{number}", row) for number, row in enumerate(rows, start=1))

    def options(self, model_max_length: int | None) -> PrepareOptions:
        return PrepareOptions(
            limit=self.limit,
            max_length=shorter(self.max_length, model_max_length),
            truncation=self.truncation,
            format=self.format,
            columns=self.columns,
            chat_template=self.chat_template,
        )


def shorter(max_length: int, model_max_length: int | None) -> int:
    """Return the smaller of the two; a model that names no limit has none."""
    return max_length if model_max_length is None else min(max_length, model_max_length)
