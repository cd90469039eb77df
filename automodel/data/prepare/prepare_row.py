"""What one row becomes: read in its format, then tokenised and cut for a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from automodel.data.chat.stops import NO_STOPS, Stops
from automodel.data.formats.row_format import RowReader
from automodel.data.formats.samples import Messages
from automodel.data.prepare.options import PrepareOptions
from automodel.data.prepare.tokenize import Tokens, cut, tokenize_input
from automodel.data.prepare.unused import unread_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prepared(NamedTuple):
    """What a row became: its example with all that is kept of it, or why it was dropped.

    Attributes:
        record: the columns of the task, and ``num_supervised``, ``has_end`` and ``hash`` for the statistics.
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
    reader: RowReader
    options: PrepareOptions
    task: Any
    keeps_prompts: bool = False

    def __call__(self, fields: Mapping[str, Any]) -> Prepared:
        """Return what a row becomes; raises BadRow for one that cannot be used."""
        sample, unused = self.reader.read_with_rest(fields)
        if isinstance(sample, Messages):
            unused += [f"messages.{key}" for key in sorted(unread_keys(sample.turns, self.tokenizer.chat_template))]
        prepared = self.task.prepare(sample, self.tokenizer, self.options, keeps_prompts=self.keeps_prompts)
        return prepared._replace(unused=tuple(unused))


def prepare_input(text: str, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions, **targets: Any) -> Prepared:
    """Tokenise a text that the model reads and does not write, cut as the options say.

    Args:
        targets: what the model should answer: further columns of the prepared row.

    Raises:
        BadRow: the text is too long, and ``truncation`` is ``error``.
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
    """Return a hash of the tokens and labels of a row, by which equal rows are found; it fits int64."""
    digest = hashlib.blake2b(json.dumps([ids, labels]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
