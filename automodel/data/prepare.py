"""Turn rows into prepared sets: read, recognise, tokenise, cut, and count what became of each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from automodel.data.chat import set_chat_template, tokenize_messages
from automodel.data.formats import FormatName, Messages, PromptCompletion, TextLabel, choose_format
from automodel.data.readers import MAX_PROBLEMS, BadRow, Row, raise_problems
from automodel.data.rows import ClassificationRows, Prompt, RowCounts, SFTRows
from automodel.data.tokenize import (
    Tokens,
    Truncation,
    cut,
    leading_ids,
    require_eos,
    shifted_example,
    tokenize_completion,
    tokenize_text,
)
from automodel.types import IGNORE_INDEX, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from automodel.data.sources import Source

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
                self.hash.update(json.dumps(fields, sort_keys=True).encode())
                handle(fields)
            except BadRow as error:
                self._num_problems += 1
                if len(self._problems) < MAX_PROBLEMS:
                    self._problems.append(f"{place}: {error}")
        raise_problems(self._problems, self._num_problems)

    @property
    def fingerprint(self) -> str:
        return self.hash.hexdigest()[:16]

    def require_rows(self, name: str, num_examples: int) -> None:
        """Raise UserError if nothing is left to train on."""
        if not self.counts.num_rows_read:
            raise UserError(f"dataset.path={name} holds no rows")
        if not num_examples:
            raise UserError(
                f"{name}: of all {self.counts.num_rows_read} rows nothing supervised is left within "
                f"dataset.max_length={self.options.max_length} tokens; raise it, or choose another truncation"
            )


def load_sft(source: Source, tokenizer: PreTrainedTokenizerBase, *, model_max_length: int | None) -> SFTRows:
    """Read and prepare the rows of ``source`` for a causal language model; the answers alone are supervised.

    Raises:
        UserError: damaged rows (all of them counted, the first ones named), or none left.
    """
    require_eos(tokenizer)
    name, options = source.display_name, source.options(model_max_length)
    collector = _Collector(options)
    examples: list[dict[str, Any]] = []
    prompts: list[Prompt] = []
    chosen: list[Any] = []

    def handle(fields: dict[str, Any]) -> None:
        if not chosen:
            chosen.append(
                choose_format(options.format, options.columns, row=fields, is_classification=False)
            )
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
        prompts.append(_prompt(shape, tokens))

    collector.each(source.rows(is_classification=False), handle)
    collector.require_rows(name, len(examples))
    return SFTRows(name, _as_dataset(examples, is_classification=False), prompts, collector.fingerprint, collector.counts)


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
        ids = leading_ids(tokenizer) + tokenize_text(tokenizer, shape.text)
        tokens = cut(Tokens(ids, [False] * len(ids), 0), max_length=options.max_length, truncation=options.truncation)
        if tokens is None:
            collector.counts.num_dropped += 1
            return
        collector.counts.num_truncated += len(tokens.ids) < len(ids)
        texts.append(_without_trailing_pad(tokenizer, tokens.ids))
        labels.append(shape.label)

    collector.each(source.rows(is_classification=True), handle)
    collector.require_rows(name, len(texts))
    collector.counts.num_label_tokens = len(texts)
    names = tuple(label_names) if label_names is not None else _sorted_labels(set(labels))
    if len(names) < 2:
        raise UserError(f"{name}: every row has the label {names[0]!r}; a classifier needs two labels or more")
    number = {label: index for index, label in enumerate(names)}
    examples = [{"input_ids": ids, "labels": number[label]} for ids, label in zip(texts, labels, strict=True)]
    dataset = _as_dataset(examples, is_classification=True)
    return ClassificationRows(name, dataset, names, collector.fingerprint, collector.counts)


def _tokenize(tokenizer: PreTrainedTokenizerBase, shape: PromptCompletion | Messages) -> Tokens:
    if isinstance(shape, PromptCompletion):
        return tokenize_completion(tokenizer, shape)
    return tokenize_messages(tokenizer, shape)


def _prompt(shape: PromptCompletion | Messages, tokens: Tokens) -> Prompt:
    ids = tokens.ids[: tokens.num_prompt]
    if isinstance(shape, PromptCompletion):
        return Prompt(ids, shape.completion, shape.prompt, shape.kind)
    turns = shape.turns
    last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    question = turns[last - 1]["content"] if last else ""
    return Prompt(ids, turns[last]["content"], question)


def _as_dataset(examples: list[dict[str, Any]], *, is_classification: bool) -> Any:
    """Keep the rows in Arrow, a few bytes a token."""
    from datasets import Dataset, Features, List, Value

    ids = List(Value("int32"))
    features = Features({"input_ids": ids, "labels": Value("int32") if is_classification else ids})
    return Dataset.from_list(examples, features=features)


def _without_trailing_pad(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Drop pad ids at the end: transformers' classifiers look for the last token that is not pad."""
    end = len(ids)
    while end > 1 and ids[end - 1] in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        end -= 1
    return ids[:end]


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    is_numeric = all(label.removeprefix("-").isdecimal() for label in labels)
    return tuple(sorted(labels, key=int if is_numeric else None))


def _some(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
