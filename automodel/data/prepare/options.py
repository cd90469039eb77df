"""The keys of a dataset section that decide what its rows become."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Truncation = Literal["right", "left", "drop", "error"]
Supervise = Literal["all", "last"]
OnBadRow = Literal["stop", "skip"]


@dataclass(frozen=True)
class PrepareOptions:
    """The keys of a dataset section that decide what a row becomes."""

    limit: int | None
    max_length: int
    truncation: Truncation
    format: str = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    supervise: Supervise = "all"
    on_bad_row: OnBadRow = "stop"
    num_proc: int | None = None
    is_model_limit: bool = False

    @property
    def length_limit(self) -> str:
        """What limits the length of a row, for messages."""
        if self.is_model_limit:
            return f"the model's limit of {self.max_length} tokens (dataset.max_length allows more)"
        return f"dataset.max_length={self.max_length} tokens"

    def deciding_tokens(self) -> dict[str, Any]:
        """Return the options that decide the tokens of the rows."""
        others = ("num_proc", "on_bad_row", "is_model_limit")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in others}


def smaller_limit(max_length: int, model_max_length: int | None) -> int:
    """Return the smaller of the two; a model that names no limit has none."""
    return max_length if model_max_length is None else min(max_length, model_max_length)
