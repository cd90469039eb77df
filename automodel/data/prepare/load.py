"""Prepared sets on disk: built once from a source, and then mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.data.chat.stops import Stops
from automodel.data.chat.templates import set_chat_template
from automodel.data.formats.choose import choose_for_file
from automodel.data.formats.row_format import RowReader
from automodel.data.formats.samples import PlainText
from automodel.data.prepare.cache import build_once
from automodel.data.prepare.cache_key import rows_key
from automodel.data.prepare.options import PrepareOptions
from automodel.data.prepare.prepare_row import RowPreparer
from automodel.data.prepare.prepared import PreparedRows, Prompts, Proof, RowCounts, RowStats
from automodel.data.prepare.proof import PROVED_ROWS, prove
from automodel.data.prepare.unused import report_unused
from automodel.data.prepare.writer import RowWriter
from automodel.data.rows import BadRow, ReadRow
from automodel.logs import get_logger, warn_for_all
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from automodel.data.sources import Source

log = get_logger(__name__)


def load_rows(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    task: Any,
    *,
    model_max_length: int | None,
    keeps_prompts: bool = False,
) -> PreparedRows:
    """Prepare the rows of ``source`` for ``task``, or take them from the cache.

    Where the rows are conversations, the tokenizer gets the chat template they were rendered with.

    Args:
        task: a Task of ``automodel/tasks``.
        keeps_prompts: keep the prompts too, to generate answers to them, if the task is generative.

    Raises:
        UserError: damaged rows (all of them counted, the first ones named), or none left.
    """
    task.require_tokenizer(tokenizer)
    keeps_prompts = keeps_prompts and task.is_generative
    name, options = source.display_name, source.options(model_max_length)
    reader = choose_for_file(source.rows(samples=task.samples), options.format, options.columns, samples=task.samples)
    key = rows_key(source, tokenizer, options, task=task, reader=reader, keeps_prompts=keeps_prompts)
    preparer = None if reader is None else row_preparer(tokenizer, reader, options, task, keeps_prompts=keeps_prompts)
    columns = task.columns(keeps_prompts=keeps_prompts)
    folder = build_once(
        key,
        lambda folder: RowWriter(source, options, folder, samples=task.samples, columns=columns).write(preparer),
    )
    meta, counts, stats = _read_meta(folder)
    _require_rows(name, options, counts, num_examples=len(stats.lengths))
    _log_counts(name, options, counts)
    proof = _prove(source.rows(samples=task.samples), tokenizer, options, reader)
    if proof.num_rows and not proof.differences:
        log.info("%s: the tokens of the first %d rows agree with their texts", name, proof.num_rows)
    table = _open(folder)
    prompts = Prompts(table.select_columns(["prompt_ids", "answer", "question", "kind"])) if keeps_prompts else ()
    return PreparedRows(
        name=name,
        table=table,
        task=task,
        fingerprint=meta["fingerprint"],
        counts=counts,
        stats=stats,
        format_name=reader.name,
        is_conversation=reader.format.is_rendered,
        has_answers=reader.format.sample is not PlainText,
        prompts=prompts,
        stops=Stops(**{kind: frozenset(ends) for kind, ends in meta["stops"].items()}),
        proof=proof,
        has_weights=meta["has_weights"],
        is_model_limit=options.is_model_limit,
    )


def row_preparer(
    tokenizer: PreTrainedTokenizerBase,
    reader: RowReader,
    options: PrepareOptions,
    task: Any,
    *,
    keeps_prompts: bool = False,
) -> RowPreparer:
    """Return what prepares each row, once the tokenizer has the chat template that renders such rows, if any."""
    if reader.format.is_rendered:
        set_chat_template(tokenizer, options.chat_template, options.chat_template_kwargs)
    return RowPreparer(tokenizer, reader, options, task, keeps_prompts)


def _prove(
    rows: Iterable[ReadRow], tokenizer: PreTrainedTokenizerBase, options: PrepareOptions, reader: RowReader
) -> Proof:
    """Compare the first rows, read again, with their texts: also where they come from the cache."""

    def samples() -> Iterator[tuple[str, Any]]:
        for place, fields in islice(rows, min(PROVED_ROWS, options.limit or PROVED_ROWS)):
            if not isinstance(fields, BadRow):
                with suppress(BadRow):
                    yield place, reader.read(fields)

    return prove(tokenizer, samples(), supervise=options.supervise)


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
    report_unused(name, counts)
