"""Prepared rows: token ids with labels, and what became of the rows that were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A question to generate an answer for.

    Attributes:
        prompt_ids: the tokens before the answer, as in training.
        kind: the group that its score is reported under, if any.
    """

    prompt_ids: list[int]
    answer: str
    question: str
    kind: str | None = None


@dataclass
class RowCounts:
    """What became of the rows that were read."""

    num_rows_read: int = 0
    num_dropped: int = 0
    num_truncated: int = 0
    num_label_tokens: int = 0


@dataclass(frozen=True)
class SFTRows:
    """Rows for a causal language model.

    Attributes:
        examples: map-style rows of ``input_ids`` and ``labels``, both [T]; ``labels[t]`` is what position ``t``
            must predict (the next token), or -100.
        prompts: a generation prompt for each row, in the rows' order.
    """

    name: str
    examples: Sequence[dict[str, Any]]
    prompts: list[Prompt]
    fingerprint: str
    counts: RowCounts = field(default_factory=RowCounts)


@dataclass(frozen=True)
class ClassificationRows:
    """Rows for a sequence classifier.

    Attributes:
        examples: map-style rows of ``input_ids`` [T] and ``labels``, an index into ``label_names``.
    """

    name: str
    examples: Sequence[dict[str, Any]]
    label_names: tuple[str, ...]
    fingerprint: str
    counts: RowCounts = field(default_factory=RowCounts)
