"""What one row becomes: recognised, tokenised, cut; and what is done about a damaged one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from automodel.data.chat.stops import NO_STOPS, Stops
from automodel.data.chat.templates import set_chat_template
from automodel.data.formats.choose import (
    FormatName,
    Messages,
    RowFormat,
    UnknownFormat,
    choose_format,
    missing_fields,
)
from automodel.data.prepare.prepared import RowCounts, renders_with_template
from automodel.data.prepare.tokenize import (
    Supervise,
    Tokens,
    Truncation,
    cut,
    tokenize_input,
)
from automodel.data.prepare.unused import unread_keys
from automodel.data.rows import MAX_PROBLEMS, BadRow, Row, raise_problems
from automodel.logs import get_logger, warn_for_all
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

ReadRow = Row | tuple[str, BadRow]


_NUM_FIRST_ROWS = 1000
"""Rows among which a field is looked for that the user names and the first row lacks."""

OnBadRow = Literal["stop", "skip"]


@dataclass(frozen=True)
class PrepareOptions:
    """The keys of a dataset section that decide what a row becomes."""

    limit: int | None
    max_length: int
    truncation: Truncation
    format: FormatName = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    supervise: Supervise = "all"
    on_bad_row: OnBadRow = "stop"
    num_proc: int | None = None
    is_model_limit: bool = False

    @property
    def length_limit(self) -> str:
        """What bounds the length of a row, in words."""
        if self.is_model_limit:
            return f"the model's limit of {self.max_length} tokens (dataset.max_length allows more)"
        return f"dataset.max_length={self.max_length} tokens"


class Prepared(NamedTuple):
    """What a row became: its example with all that is kept of it, or why it was dropped.

    Attributes:
        notes: what the user should know, which is counted over the rows.
        stops: the ends that its example supervises.
        unused: the fields that hold something and that nothing read.
    """

    record: dict[str, Any] | None
    is_truncated: bool = False
    is_too_long: bool = False
    notes: tuple[str, ...] = ()
    stops: Stops = NO_STOPS
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowPreparer:
    """Prepares the fields of a row for a task; picklable."""

    tokenizer: PreTrainedTokenizerBase
    format: RowFormat
    options: PrepareOptions
    task: Any
    keeps_prompts: bool

    def __call__(self, fields: Mapping[str, Any]) -> Prepared:
        """Raises BadRow for a row that cannot be used."""
        sample, unused = self.format.read_with_rest(fields)
        if isinstance(sample, Messages):
            unused += [f"messages.{key}" for key in sorted(unread_keys(sample.turns, self.tokenizer.chat_template))]
        prepared = self.task.prepare(sample, self.tokenizer, self.options, keeps_prompts=self.keeps_prompts)
        return prepared._replace(unused=tuple(unused))


def prepare_input(text: str, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions, **targets: Any) -> Prepared:
    """Tokenise a text that the model reads and does not write, cut as the options say.

    Args:
        targets: what it should answer, columns of the prepared row.
    """
    before, ids, after = tokenize_input(tokenizer, text)
    tokens = cut(
        Tokens(ids, [0.0] * len(ids), 0),
        max_length=max(1, options.max_length - len(before) - len(after)),
        truncation=options.truncation,
        limit=options.length_limit,
    )
    if tokens is None:
        return Prepared(None, is_too_long=True)
    whole = _without_trailing_pad(tokenizer, before + tokens.ids + after)
    record = {"input_ids": whole, **targets, "num_supervised": 1, "has_end": True, "hash": row_hash(whole, [])}
    return Prepared(record, is_truncated=len(tokens.ids) < len(ids))


def set_template(tokenizer: PreTrainedTokenizerBase, format_name: str, options: PrepareOptions) -> None:
    """Give ``tokenizer`` the chat template of ``options``, where rows of this format are rendered with one."""
    if renders_with_template(format_name):
        set_chat_template(tokenizer, options.chat_template, options.chat_template_kwargs)


def choose_first(rows: Iterable[ReadRow], options: PrepareOptions, *, candidates: Sequence[str]) -> RowFormat | None:
    """Return the format that the first row that can be read has; None where there is no such row.

    A field that the user names may be missing from the first row, if another of the first ones holds it.
    """
    rows = iter(rows)
    for place, fields in rows:
        if isinstance(fields, BadRow):
            continue
        try:
            fields = fields | _held_later(rows, missing_fields(options.columns, fields))
            return choose_format(options.format, options.columns, row=fields, candidates=candidates)
        except UnknownFormat as error:
            raise UserError(f"{place}: {error}") from error
    return None


def _held_later(rows: Iterator[ReadRow], missing: Collection[str]) -> dict[str, None]:
    """Return those of the missing fields that one of the next rows has."""
    found: set[str] = set()
    for _, fields in islice(rows, _NUM_FIRST_ROWS if missing else 0):
        found |= {field for field in missing if not isinstance(fields, BadRow) and field in fields}
        if len(found) == len(missing):
            break
    return dict.fromkeys(found)


class BadRows:
    """Collects what is wrong with rows, instead of stopping at the first, or skips them and counts."""

    def __init__(self, policy: OnBadRow, counts: RowCounts) -> None:
        self.policy, self.counts = policy, counts

    def add(self, place: str, error: BadRow) -> None:
        self.counts.num_bad += 1
        if len(self.counts.bad_rows) < MAX_PROBLEMS:
            self.counts.bad_rows.append(f"{place}: {error}")

    def settle(self, name: str) -> None:
        """Raise the problems found, or say that their rows are skipped."""
        if self.policy == "stop":
            raise_problems(self.counts.bad_rows, self.counts.num_bad)
        tell_skipped(name, self.counts)


def tell_skipped(name: str, counts: RowCounts) -> None:
    """Say which damaged rows were skipped, if any."""
    if counts.num_bad:
        first = "\n  ".join(counts.bad_rows)
        warn_for_all(log, "%s: %d damaged rows are skipped, the first of them:\n  %s", name, counts.num_bad, first)


def _without_trailing_pad(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Drop pad ids at the end: transformers' classifiers look for the last token that is not pad.

    A tokenizer without a pad token pads with eos, which is then dropped as well.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


def row_hash(ids: Sequence[int], labels: Sequence[int]) -> int:
    """Return what tells a row from others, by its tokens and labels."""
    digest = hashlib.blake2b(json.dumps([ids, labels]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
