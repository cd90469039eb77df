"""Prepared sets on disk: built once from a source, and then mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.data.chat.stops import Stops
from automodel.data.formats.choose import RowFormat
from automodel.data.prepare.cache import build_once
from automodel.data.prepare.labels import numbered_labels
from automodel.data.prepare.prepared import ClassificationRows, Prompts, RowCounts, RowStats, SFTRows
from automodel.data.prepare.preparers import (
    ClassificationPreparer,
    PrepareOptions,
    SFTPreparer,
    choose_first,
    set_template,
)
from automodel.data.prepare.proof import PROVED_ROWS, Proof, prove
from automodel.data.prepare.tokenize import require_eos
from automodel.data.prepare.unused import tell_unused
from automodel.data.prepare.writer import Builder, Source, facts_of
from automodel.data.rows import BadRow
from automodel.logs import get_logger, warn_for_all
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)


def load_sft(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, model_max_length: int | None, keeps_prompts: bool = True
) -> SFTRows:
    """Prepare the rows of ``source`` for a causal language model, or take them from the cache.

    Where the rows are conversations, the tokenizer gets the chat template they were rendered with.

    Args:
        keeps_prompts: keep the prompts too, to generate answers to them.

    Raises:
        UserError: damaged rows (all of them counted, the first ones named), or none left.
    """
    require_eos(tokenizer)
    name, options = source.display_name, source.options(model_max_length)

    def prepare(row_format: RowFormat) -> SFTPreparer:
        set_template(tokenizer, row_format.name, options)
        return SFTPreparer(tokenizer, row_format, options, keeps_prompts)

    facts = facts_of(source, tokenizer, options) | {"for": "causal language model", "prompts": keeps_prompts}
    columns = {"input_ids": "ids", "labels": "ids", "loss_weights": "weights"}
    if keeps_prompts:
        columns |= {"prompt_ids": "ids", "answer": "text", "question": "text", "kind": "text"}
    folder = build_once(
        facts, lambda folder: Builder(source, options, folder, columns).build(prepare, is_classification=False)
    )
    meta, counts, stats = _read_meta(folder)
    set_template(tokenizer, meta["format"], options)
    _require_rows(name, options, counts, num_examples=len(stats.lengths))
    _log_counts(name, options, counts)
    proof = _prove(source, tokenizer, options)
    if proof.num_rows and not proof.differences:
        log.info("%s: the tokens of the first %d rows agree with their texts", name, proof.num_rows)
    table = _open(folder)
    names = ["input_ids", "labels"] + (["loss_weights"] if meta["has_weights"] else [])
    prompts = table.select_columns(["prompt_ids", "answer", "question", "kind"]) if keeps_prompts else []
    examples = table.select_columns(names)
    stops = Stops(**{kind: frozenset(ends) for kind, ends in meta["stops"].items()})
    return SFTRows(
        name, examples, Prompts(prompts), meta["fingerprint"], counts, stats, meta["format"], stops,
        proof, options.is_model_limit,
    )  # fmt: skip


def _prove(source: Source, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions) -> Proof:
    """Compare the first rows, read again, with their texts: also where they come from the cache."""
    row_format = choose_first(source.rows(is_classification=False), options, is_classification=False)

    def shapes() -> Iterator[tuple[str, Any]]:
        for place, fields in islice(
            source.rows(is_classification=False), min(PROVED_ROWS, options.limit or PROVED_ROWS)
        ):
            if not isinstance(fields, BadRow):
                with suppress(BadRow):
                    yield place, row_format.read(fields)

    return prove(tokenizer, shapes(), supervise=options.supervise)


def load_classification(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_max_length: int | None,
    known: ClassificationRows | None = None,
    set_aside: Source | None = None,
    head_labels: Sequence[str] = (),
) -> ClassificationRows:
    """Prepare the rows of ``source`` for a sequence classifier, or take them from the cache.

    Args:
        known: the training set, whose labels validation rows must keep to; None collects them.
        set_aside: rows whose labels count as well, though they are not trained on.
        head_labels: those of the checkpoint's own head, by index.

    Raises:
        UserError: damaged rows, an unknown label, or no rows.
    """
    import numpy as np

    name = source.display_name
    table, meta, counts, stats = _prepared_texts(source, tokenizer, model_max_length, known)
    if known is not None:
        names, spelt = known.label_names, known.spelt
    else:
        labels = set(table.unique("label"))
        if set_aside is not None:
            labels |= set(_prepared_texts(set_aside, tokenizer, model_max_length, None)[0].unique("label"))
        if len(labels) < 2:
            raise UserError(f"{name}: every row has the label {labels.pop()!r}; a classifier needs two labels or more")
        names, spelt = numbered_labels(name, labels, head_labels)
    number = {label: index for index, label in enumerate(spelt)}
    indices = np.fromiter((number[label] for label in table["label"]), dtype=np.int32, count=len(table))
    examples = table.select_columns(["input_ids"]).add_column("labels", indices)
    is_model_limit = source.options(model_max_length).is_model_limit
    return ClassificationRows(name, examples, names, spelt, meta["fingerprint"], counts, stats, is_model_limit)


def _prepared_texts(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    model_max_length: int | None,
    known: ClassificationRows | None,
) -> tuple[Any, dict[str, Any], RowCounts, RowStats]:
    """Return the tokenised texts with the names of their labels, and what became of the rows."""
    name, options = source.display_name, source.options(model_max_length)
    names = None if known is None else known.spelt

    def prepare(row_format: RowFormat) -> ClassificationPreparer:
        return ClassificationPreparer(tokenizer, row_format, options, names)

    facts = facts_of(source, tokenizer, options) | {"for": "classifier", "labels": names}
    columns = {"input_ids": "ids", "label": "text"}
    folder = build_once(
        facts, lambda folder: Builder(source, options, folder, columns).build(prepare, is_classification=True)
    )
    meta, counts, stats = _read_meta(folder)
    _require_rows(name, options, counts, num_examples=len(stats.lengths))
    _log_counts(name, options, counts)
    return _open(folder), meta, counts, stats


def _read_meta(folder: Path) -> tuple[dict[str, Any], RowCounts, RowStats]:
    import numpy as np

    meta = json.loads((folder / "meta.json").read_text())
    with np.load(folder / "stats.npz") as stats:
        return meta, RowCounts(**meta["counts"]), RowStats(**dict(stats))


def _open(folder: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(folder / "rows.arrow"))


def _require_rows(name: str, options: PrepareOptions, counts: RowCounts, *, num_examples: int) -> None:
    """Raise UserError if nothing is left to train on."""
    if not counts.num_rows_read:
        raise UserError(f"dataset.path={name} holds no rows")
    if counts.num_bad == counts.num_rows_read:
        raise UserError(f"{name}: all {counts.num_bad} rows are damaged, such as {counts.bad_rows[0]}")
    if not num_examples:
        raise UserError(
            f"{name}: of all {counts.num_rows_read} rows nothing supervised is left within {options.length_limit}; "
            f"{'choose' if options.is_model_limit else 'raise it, or choose'} another truncation"
        )


def _log_counts(name: str, options: PrepareOptions, counts: RowCounts) -> None:
    """Say in one line what became of the rows."""
    log.info(
        "%s: %d rows, %d cut to %s, %d dropped, %d supervised tokens",
        name, counts.num_rows_read, counts.num_truncated, options.length_limit, counts.num_dropped,
        counts.num_label_tokens,
    )  # fmt: skip
    for note, num_rows in counts.notes.items():
        warn_for_all(log, "%s: %d of %d rows: %s", name, num_rows, counts.num_rows_read, note)
    tell_unused(name, counts)
