"""Prepared rows: token ids with labels on disk, and what became of the rows that were read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from automodel.data.chat.stops import NO_STOPS, Stops

if TYPE_CHECKING:
    import numpy as np


class Proof(NamedTuple):
    """How many rows were compared with their texts, and where they differ, a line each."""

    num_rows: int
    differences: list[str]


NO_PROOF = Proof(0, [])


@dataclass(frozen=True)
class Prompt:
    """A question to generate an answer for.

    Attributes:
        prompt_ids: the tokens before the answer, as in training.
        answer: the text of the tokens after them that training supervises, without the end.
        kind: the group that its score is reported under, if any.
    """

    prompt_ids: list[int]
    answer: str
    question: str
    kind: str | None = None


@dataclass
class RowCounts:
    """What became of the rows that were read.

    Attributes:
        num_unsupervised: rows dropped because nothing supervised is left of them; the others of ``num_dropped`` were
            too long for ``truncation=drop``.
        largest_id: of the tokens that are kept.
        unused: fields that nothing reads, with the number of rows that hold something in them.
        num_bad: damaged rows that were skipped; ``bad_rows`` names the first of them.
        notes: what the user should know of rows that are trained on, with their number.
    """

    num_rows_read: int = 0
    num_dropped: int = 0
    num_unsupervised: int = 0
    num_truncated: int = 0
    num_label_tokens: int = 0
    largest_id: int = -1
    num_bad: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def count_unused(self, names: Iterable[str]) -> None:
        """Count a row that holds something in fields which nothing reads."""
        for name in names:
            self.unused[name] = self.unused.get(name, 0) + 1


@dataclass(frozen=True)
class RowStats:
    """One entry for every example, in their order.

    Attributes:
        lengths: tokens, as cut; int32 [N].
        num_supervised: supervised positions; int32 [N].
        has_end: whether an end token is supervised, so that the row teaches to stop; bool [N].
        hashes: of the token ids and labels, to find rows that come again; int64 [N].
    """

    lengths: np.ndarray
    num_supervised: np.ndarray
    has_end: np.ndarray
    hashes: np.ndarray


class Prompts(Sequence[Prompt]):
    """A prompt for each example, read from disk when it is asked for."""

    def __init__(self, table: Any, limit: int | None = None) -> None:
        self._table = table
        self._num_rows = len(table) if limit is None else min(limit, len(table))

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            if index.start or index.step not in (None, 1):
                return [self[i] for i in range(*index.indices(len(self)))]
            return Prompts(self._table, len(range(*index.indices(len(self)))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return Prompt(**self._table[index % len(self)])

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class PreparedRows:
    """The rows of one source, prepared for a task.

    Attributes:
        table: what the task keeps of every row, as a map-style table of its columns.
        prompts: a generation prompt for each row, in the rows' order; empty unless they were asked for.
        format_name: the format that the rows were recognised as.
        is_conversation: whether a chat template rendered the rows.
        has_answers: whether the rows are more than text, so that they should teach where an answer ends.
        stops: the ends of answers that are supervised.
        proof: the result of comparing the first rows' tokens with their texts.
        has_weights: whether a row has loss weights.
        is_model_limit: whether the model, and not ``dataset.max_length``, bounds the length of a row.
    """

    name: str
    table: Any
    task: Any
    fingerprint: str
    counts: RowCounts
    stats: RowStats
    format_name: str = ""
    is_conversation: bool = False
    has_answers: bool = True
    prompts: Sequence[Prompt] = ()
    stops: Stops = NO_STOPS
    proof: Proof = NO_PROOF
    has_weights: bool = False
    is_model_limit: bool = False

    @cached_property
    def examples(self) -> Any:
        """Map-style rows for the task's collator."""
        return self.task.examples(self)
