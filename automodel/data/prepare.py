"""Turn rows into prepared sets: read, recognise, tokenise, cut, and count what became of each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from automodel.data.chat import set_chat_template, tokenize_messages
from automodel.data.formats import FormatName, Messages, PromptCompletion, TextLabel, UnknownFormat, choose_format
from automodel.data.readers import MAX_PROBLEMS, BadRow, Row, raise_problems
from automodel.data.rows import ClassificationRows, Prompt, RowCounts, SFTRows
from automodel.data.tokenize import (
    Tokens,
    Truncation,
    cut,
    require_eos,
    shifted_example,
    tokenize_completion,
    tokenize_input,
)
from automodel.logs import get_logger
from automodel.types import IGNORE_INDEX, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

ReadRow = Row | tuple[str, BadRow]


@dataclass(frozen=True)
class PrepareOptions:
    """The keys of a dataset section that decide what a row becomes."""

    limit: int | None
    max_length: int
    truncation: Truncation
    format: FormatName = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    chat_template: str | None = None


class Source(Protocol):
    """What a section of the ``dataset`` group builds."""

    @property
    def display_name(self) -> str:
        """What the rows are called in messages."""

    def rows(self, *, is_classification: bool) -> Iterable[ReadRow]:
        """Yield every row with its place, a damaged one as what is wrong with it."""

    def options(self, model_max_length: int | None) -> PrepareOptions:
        """Return what decides how a row is prepared, for a model that takes so many tokens."""


class _Collector:
    """Runs a function over rows, collecting what is wrong with them instead of stopping at the first."""

    def __init__(self, options: PrepareOptions) -> None:
        self.options = options
        self.counts = RowCounts()
        self.hash = hashlib.sha256(json.dumps(options.__dict__, sort_keys=True, default=str).encode())
        self._problems: list[str] = []
        self._num_problems = 0

    def each(self, rows: Iterable[ReadRow], handle: Callable[[dict[str, Any]], None]) -> None:
        """Hand the fields of every row up to the limit to ``handle``; raises UserError for the damaged ones."""
        for place, fields in rows:
            if self.options.limit is not None and self.counts.num_rows_read >= self.options.limit:
                break
            self.counts.num_rows_read += 1
            try:
                if isinstance(fields, BadRow):
                    raise fields
                # A row of the hub may hold what JSON has no word for, such as a date.
                self.hash.update(json.dumps(fields, sort_keys=True, default=str).encode())
                handle(fields)
            except UnknownFormat as error:
                raise UserError(*self._problems, f"{place}: {error}") from error
            except BadRow as error:
                self._num_problems += 1
                if len(self._problems) < MAX_PROBLEMS:
                    self._problems.append(f"{place}: {error}")
        raise_problems(self._problems, self._num_problems)

    @property
    def fingerprint(self) -> str:
        return self.hash.hexdigest()[:16]

    def log_counts(self, name: str) -> None:
        """Say in one line what became of the rows."""
        counts = self.counts
        log.info(
            "%s: %d rows, %d cut to %d tokens, %d dropped, %d supervised tokens",
            name, counts.num_rows_read, counts.num_truncated, self.options.max_length, counts.num_dropped,
            counts.num_label_tokens,
        )  # fmt: skip

    def require_rows(self, name: str, num_examples: int) -> None:
        """Raise UserError if nothing is left to train on."""
        if not self.counts.num_rows_read:
            raise UserError(f"dataset.path={name} holds no rows")
        if not num_examples:
            raise UserError(
                f"{name}: of all {self.counts.num_rows_read} rows nothing supervised is left within "
                f"dataset.max_length={self.options.max_length} tokens; raise it, or choose another truncation"
            )


class _Examples:
    """Gathers rows in Arrow, a few bytes a token; only the latest are held as lists of Python's numbers."""

    NUM_ROWS_A_CHUNK = 1000  # few enough to be small as lists, and many enough for few chunks

    def __init__(self, *, is_classification: bool) -> None:
        self._is_classification = is_classification
        self._chunks: list[Any] = []
        self._latest: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return sum(map(len, self._chunks)) + len(self._latest)

    def append(self, example: dict[str, Any]) -> None:
        self._latest.append(example)
        if len(self._latest) == self.NUM_ROWS_A_CHUNK:
            self._close_chunk()

    def dataset(self) -> Any:
        """Return all rows as one map-style set."""
        from datasets import concatenate_datasets

        if self._latest:
            self._close_chunk()
        return concatenate_datasets(self._chunks)

    def _close_chunk(self) -> None:
        from datasets import Dataset, Features, List, Value

        ids = List(Value("int32"))
        features = Features({"input_ids": ids, "labels": Value("int32") if self._is_classification else ids})
        self._chunks.append(Dataset.from_list(self._latest, features=features))
        self._latest = []


def load_sft(source: Source, tokenizer: PreTrainedTokenizerBase, *, model_max_length: int | None) -> SFTRows:
    """Read and prepare the rows of ``source`` for a causal language model; the answers alone are supervised.

    Raises:
        UserError: damaged rows (all of them counted, the first ones named), or none left.
    """
    require_eos(tokenizer)
    name, options = source.display_name, source.options(model_max_length)
    collector = _Collector(options)
    examples = _Examples(is_classification=False)
    prompts: list[Prompt] = []
    chosen: list[Any] = []

    def handle(fields: dict[str, Any]) -> None:
        if not chosen:
            chosen.append(choose_format(options.format, options.columns, row=fields, is_classification=False))
            if chosen[0].name != "prompt_completion":
                set_chat_template(tokenizer, options.chat_template)
        shape = chosen[0].read(fields)
        tokens = _tokenize(tokenizer, shape)
        short = cut(tokens, max_length=options.max_length, truncation=options.truncation)
        example = shifted_example(short) if short is not None else None
        if example is None:
            collector.counts.num_dropped += 1
            return
        collector.counts.num_truncated += len(short.ids) < len(tokens.ids)
        collector.counts.num_label_tokens += sum(label != IGNORE_INDEX for label in example["labels"])
        examples.append(example)
        prompts.append(_prompt(shape, tokens, max_length=options.max_length))

    collector.each(source.rows(is_classification=False), handle)
    collector.require_rows(name, len(examples))
    collector.log_counts(name)
    return SFTRows(name, examples.dataset(), prompts, collector.fingerprint, collector.counts)


def load_classification(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_max_length: int | None,
    label_names: Sequence[str] | None = None,
) -> ClassificationRows:
    """Read and prepare the rows of ``source`` for a sequence classifier.

    Args:
        label_names: the labels of the training set, which validation rows must keep to; None collects them.

    Raises:
        UserError: damaged rows, an unknown label, or no rows.
    """
    name, options = source.display_name, source.options(model_max_length)
    collector = _Collector(options)
    texts: list[list[int]] = []
    labels: list[str] = []
    chosen: list[Any] = []

    def handle(fields: dict[str, Any]) -> None:
        if not chosen:
            chosen.append(choose_format(options.format, options.columns, row=fields, is_classification=True))
        shape: TextLabel = chosen[0].read(fields)
        if label_names is not None and shape.label not in label_names:
            raise BadRow(f"label {shape.label!r} does not occur in the training set; its labels: {_some(label_names)}")
        before, ids, after = tokenize_input(tokenizer, shape.text)
        room = max(1, options.max_length - len(before) - len(after))
        tokens = cut(Tokens(ids, [False] * len(ids), 0), max_length=room, truncation=options.truncation)
        if tokens is None:
            collector.counts.num_dropped += 1
            return
        collector.counts.num_truncated += len(tokens.ids) < len(ids)
        texts.append(_without_trailing_pad(tokenizer, before + tokens.ids + after))
        labels.append(shape.label)

    collector.each(source.rows(is_classification=True), handle)
    collector.require_rows(name, len(texts))
    collector.counts.num_label_tokens = len(texts)
    collector.log_counts(name)
    names = tuple(label_names) if label_names is not None else _sorted_labels(set(labels))
    if len(names) < 2:
        raise UserError(f"{name}: every row has the label {names[0]!r}; a classifier needs two labels or more")
    number = {label: index for index, label in enumerate(names)}
    examples = _Examples(is_classification=True)
    for ids, label in zip(texts, labels, strict=True):
        examples.append({"input_ids": ids, "labels": number[label]})
    return ClassificationRows(name, examples.dataset(), names, collector.fingerprint, collector.counts)


def _tokenize(tokenizer: PreTrainedTokenizerBase, shape: PromptCompletion | Messages) -> Tokens:
    if isinstance(shape, PromptCompletion):
        return tokenize_completion(tokenizer, shape)
    return tokenize_messages(tokenizer, shape)


def _prompt(shape: PromptCompletion | Messages, tokens: Tokens, *, max_length: int) -> Prompt:
    ids = tokens.ids[: tokens.num_prompt][-max_length:]  # the end of a prompt asks the question
    if isinstance(shape, PromptCompletion):
        return Prompt(ids, shape.completion, shape.prompt, shape.kind)
    turns = shape.turns
    last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    question = turns[last - 1]["content"] if last else ""
    return Prompt(ids, turns[last]["content"], question)


def _without_trailing_pad(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Drop pad ids at the end: transformers' classifiers look for the last token that is not pad.

    A tokenizer without a pad token pads with eos, which is then dropped as well.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    is_numeric = all(label.removeprefix("-").isdecimal() for label in labels)
    if is_numeric:  # "1" and "01" are two names of one number: the name decides, not the order of a set
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _some(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
