"""``python -m automodel.preview``: show what a configuration would train on, and stop at what would train wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from automodel.cli.command_line import load_one_config, read_own_keys, rows_of_keys, run_verb
from automodel.config.schema import Section
from automodel.logs import get_logger
from automodel.types import IGNORE_INDEX, ExitStatus, UserError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from automodel.config import Config
    from automodel.data.prepare.prepared import PreparedRows
    from automodel.runner.training_data import TrainingData

log = get_logger(__name__)

_NUM_BINS = 12
_BAR_WIDTH = 40


class Keys(Section):
    num_rows: Annotated[int, Field(ge=0)] = Field(3, description="rows shown from each source")


def main(argv: Sequence[str] | None = None) -> None:
    """Preview the rows of the command line ``argv`` (default: this process's) and leave with the status."""
    run_verb(_work, argv, usage=_usage)


def _work(argv: list[str]) -> ExitStatus:
    from automodel.logs import setup_logging

    keys, rest, problems = read_own_keys(argv, "preview", Keys)
    cfg = load_one_config(rest, problems)
    setup_logging(0)
    problems = preview(cfg, num_rows=keys.num_rows)
    if problems and cfg.data_checks != "warn":
        raise UserError(*problems)
    for problem in problems:
        log.warning("%s", problem)
    return ExitStatus.DONE


def _usage() -> str:
    return f"""python -m automodel.preview [FILE.yaml] [key=value of a run ...] [preview.num_rows=3]

Shows the first rows as they would be trained on, with the supervised tokens marked, and counts truncated, dropped and
damaged rows. Nothing is trained, and nothing is written but the cache of prepared rows.

Keys
{rows_of_keys("preview", Keys)}

Status 0: fine; 2: wrong input, or rows that would train wrongly.
All other keys: python -m automodel.run --help"""


def preview(cfg: Config, *, num_rows: int, console: Console | None = None) -> list[str]:
    """Print the rows that ``cfg`` would train on and return what would train wrongly, a line each.

    Raises:
        UserError: the rows cannot be read.
    """
    from rich.console import Console

    from automodel.runner.build import build
    from automodel.runner.recipe import build_recipe
    from automodel.runner.training_data import load_data

    console = console or Console(highlight=False, soft_wrap=True)
    model = build(cfg.model)
    tokenizer = model.load_tokenizer()
    data = load_data(cfg, build_recipe(cfg).task, model, tokenizer)
    for rows in data.sources.values():
        _show_rows(rows, tokenizer, num_rows, console)
    console.print(_table(data))
    for rows in data.sources.values():
        console.print(f"\nlengths of {rows.name}, in tokens", markup=False)
        for line in _histogram(rows.stats.lengths):
            console.print(line, markup=False)
    return [problem.text for problem in data.problems()]


def _show_rows(rows: PreparedRows, tokenizer: PreTrainedTokenizerBase, num_rows: int, console: Console) -> None:
    from rich.markup import escape

    for index in range(min(num_rows, len(rows.examples))):
        example, title = rows.examples[index], f"row {index + 1} of {len(rows.examples):,}"
        if not rows.task.is_generative:
            title = f"{title}: {rows.task.shown_target(example)}"
        console.rule(escape(f"{title}, {rows.name}"))  # the name last: a long one is cut
        if not rows.task.is_generative:
            console.print(tokenizer.decode(example["input_ids"]), markup=False)
            continue
        console.print(render(example, tokenizer, is_colored=console.is_terminal))
        weights = sorted({weight for weight in example.get("loss_weights") or () if weight})
        if weights not in ([], [1.0]):
            console.print(f"[dim]weights of supervised tokens: {', '.join(f'{w:g}' for w in weights)}[/dim]")
    if num_rows and rows.task.is_generative:
        shown = "in green" if console.is_terminal else "between « and »"
        console.print(f"[dim]supervised tokens are shown {shown}; special tokens are spelled out[/dim]\n")


def render(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, is_colored: bool) -> Text:
    """Return the text of an example, its supervised runs coloured, or bracketed where there are no colours."""
    from rich.text import Text

    text = Text()
    for ids, is_supervised in _runs(example):
        piece = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if is_colored:
            text.append(piece, style="green" if is_supervised else "")
        else:
            text.append(f"«{piece}»" if is_supervised else piece)
    return text


def _runs(example: dict[str, Any]) -> Iterator[tuple[list[int], bool]]:
    """Yield the runs of tokens that are supervised, and of those that are not."""
    ids = example["input_ids"]
    # Position t predicts token t + 1.
    is_supervised = [False, *(label != IGNORE_INDEX for label in example["labels"][:-1])]
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or is_supervised[end] != is_supervised[start]:
            yield ids[start:end], is_supervised[start]
            start = end


def _table(data: TrainingData) -> Table:
    """Return the counts of every source, a column each."""
    import numpy as np
    from rich.markup import escape
    from rich.table import Table

    from automodel.data.prepare.checks import num_duplicates, shared_rows

    columns = [*data.sources.values(), *([data.validation] if data.validation is not None else [])]
    table = Table("", *(escape(Path(rows.name).name) for rows in columns))
    quantile = {
        "min": lambda lengths: lengths.min(), "median": np.median,
        "p95": lambda lengths: np.quantile(lengths, 0.95), "max": lambda lengths: lengths.max(),
    }  # fmt: skip
    lines: dict[str, list[str]] = {
        "format": [rows.format_name for rows in columns],
        "rows" if data.train_set is not None else "rows (a sample)": [f"{c.counts.num_rows_read:,}" for c in columns],
        "damaged, skipped": [f"{c.counts.num_bad:,}" for c in columns],
        "dropped, unsupervised": [_of(c.counts.num_unsupervised, c.counts.num_rows_read) for c in columns],
        "dropped, too long": [
            _of(c.counts.num_dropped - c.counts.num_unsupervised, c.counts.num_rows_read) for c in columns
        ],
        "truncated": [_of(c.counts.num_truncated, c.counts.num_rows_read) for c in columns],
        "duplicates": [f"{num_duplicates(c):,}" for c in columns],
        "tokens": [f"{c.stats.lengths.sum():,}" for c in columns],
        **{f"tokens a row, {name}": [f"{of(c.stats.lengths):,.0f}" for c in columns] for name, of in quantile.items()},
    }
    if data.task.is_generative:
        lines |= {
            "supervised tokens": [_of(c.stats.num_supervised.sum(), c.stats.lengths.sum()) for c in columns],
            "rows whose tokens were compared with their text": [f"{c.proof.num_rows:,}" for c in columns],
            "teach to end an answer": [_of(c.stats.has_end.sum(), len(c.stats.has_end)) for c in columns],
        }
    labels = [data.task.label_counts(rows) for rows in columns]
    for label in labels[0]:
        lines[escape(f"label {label}")] = [
            _of(counts[label], len(rows.examples)) for counts, rows in zip(labels, columns, strict=True)
        ]
    if data.train_set is not None and data.pack_length is not None:
        efficiencies = [share.efficiency for share in data.train_set.shares]
        lines[f"filled of {data.pack_length:,} slots"] = [f"{each:.1%}" for each in efficiencies]
    if data.train_set is not None and len(data.sources) > 1:
        drawn = sum(share.num_drawn for share in data.train_set.shares)
        lines["drawn an epoch"] = [_of(share.num_drawn, drawn) for share in data.train_set.shares]
    if data.validation is not None:
        lines["validated on as well"] = [
            f"{len(shared_rows(rows, data.validation)):,}" for rows in data.sources.values()
        ]
    for name, values in lines.items():
        table.add_row(name, *values)
    return table


def _of(part: Any, whole: Any) -> str:
    return f"{part:,} ({part / max(1, whole):.1%})"


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    import numpy as np

    counts, edges = np.histogram(lengths, bins=min(_NUM_BINS, int(lengths.max() - lengths.min()) + 1))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(_BAR_WIDTH * count / counts.max())
        yield f"{low:7,.0f} - {high:7,.0f} {bar} {count:,}"


if __name__ == "__main__":
    main()
