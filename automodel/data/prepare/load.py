"""Prepared sets on disk: built once from a source, and then mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.data.chat.stops import Stops
from automodel.data.formats.choose import RowFormat
from automodel.data.prepare.cache import build_once
from automodel.data.prepare.prepared import PreparedRows, Prompts, Proof, RowCounts, RowStats
from automodel.data.prepare.preparers import PrepareOptions, RowPreparer, choose_first, set_template
from automodel.data.prepare.proof import PROVED_ROWS, prove
from automodel.data.prepare.unused import tell_unused
from automodel.data.prepare.writer import Builder, Source, facts_of
from automodel.data.rows import BadRow
from automodel.logs import get_logger, warn_for_all
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    def prepare(row_format: RowFormat) -> RowPreparer:
        set_template(tokenizer, row_format.name, options)
        return RowPreparer(tokenizer, row_format, options, task, keeps_prompts)

    facts = facts_of(source, tokenizer, options) | {"for": task.identity(), "prompts": keeps_prompts}
    columns = task.columns(keeps_prompts=keeps_prompts)
    folder = build_once(
        facts, lambda folder: Builder(source, options, folder, columns).build(prepare, candidates=task.formats)
    )
    meta, counts, stats = _read_meta(folder)
    set_template(tokenizer, meta["format"], options)
    _require_rows(name, options, counts, num_examples=len(stats.lengths))
    _log_counts(name, options, counts)
    proof = _prove(source, tokenizer, options, task)
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
        format_name=meta["format"],
        prompts=prompts,
        stops=Stops(**{kind: frozenset(ends) for kind, ends in meta["stops"].items()}),
        proof=proof,
        has_weights=meta["has_weights"],
        is_model_limit=options.is_model_limit,
    )


def _prove(source: Source, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions, task: Any) -> Proof:
    """Compare the first rows, read again, with their texts: also where they come from the cache."""
    row_format = choose_first(source.rows(candidates=task.formats), options, candidates=task.formats)

    def samples() -> Iterator[tuple[str, Any]]:
        num_rows = min(PROVED_ROWS, options.limit or PROVED_ROWS)
        for place, fields in islice(source.rows(candidates=task.formats), num_rows):
            if not isinstance(fields, BadRow):
                with suppress(BadRow):
                    yield place, row_format.read(fields)

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
    tell_unused(name, counts)
