"""What would train wrongly, found in prepared rows before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from automodel.data.rows import SFTRows

if TYPE_CHECKING:
    import numpy as np

MOST_UNSUPERVISED = 0.05
"""The share of rows that may lose everything they would teach."""
SURELY_WRONG = 0.9
"""From this share on, it cannot be meant."""


class Problem(NamedTuple):
    """What would train wrongly, and whether that is sure, or could be meant (a short test run, say)."""

    text: str
    is_sure: bool


def data_problems(train: SFTRows, validation: SFTRows | None = None) -> list[Problem]:
    """Return what would train wrongly.

    That is: more than a few rows of which nothing supervised is left; no row that teaches to end an answer; rows
    of the validation set that are trained on.
    """
    counts, stats = train.counts, train.stats
    problems = []
    share = counts.num_unsupervised / max(1, counts.num_rows_read)
    if share > MOST_UNSUPERVISED:
        text = (
            f"{train.name}: {counts.num_unsupervised:,} of {counts.num_rows_read:,} rows ({share:.0%}) have no "
            f"supervised token left within {_limit(train)}, keep the ends with dataset.truncation=left, or drop what "
            "is too long with dataset.truncation=drop"
        )
        problems.append(Problem(text, is_sure=share >= SURELY_WRONG))
    if train.format_name != "text" and len(stats.has_end) and not stats.has_end.any():
        are_all_cut = counts.num_truncated == len(stats.has_end)
        remedy = "look at the chat template's end of turn"
        if are_all_cut:
            of_model = "the model's limit cuts every row; take a model for longer ones"
            remedy = of_model if train.is_model_limit else "raise dataset.max_length"
        text = (
            f"{train.name}: no row supervises a token that ends an answer, so the model would learn never to stop; "
            f"{remedy}"
        )
        problems.append(Problem(text, is_sure=not are_all_cut))
    if validation is not None:
        num_shared = len(shared_rows(train, validation))
        if num_shared:
            text = (
                f"{num_shared:,} of the {len(validation.examples):,} rows of {validation.name} are trained on as well "
                f"({train.name}), so that validation would measure memory; take them out of one of the two"
            )
            problems.append(Problem(text, is_sure=False))
    return problems


def _limit(rows: SFTRows) -> str:
    """Say what bounds the length of a row, and how to lift it."""
    if rows.is_model_limit:
        return "the model's limit (dataset.max_length allows more); take a model for longer rows"
    return "dataset.max_length; raise it"


def shared_rows(train: SFTRows, validation: SFTRows) -> np.ndarray:
    """Return the numbers of the validation rows that are training rows as well; int64."""
    import numpy as np

    return np.flatnonzero(np.isin(validation.stats.hashes, train.stats.hashes))


def num_duplicates(rows: SFTRows) -> int:
    """Return how many rows are there already, tokens and labels alike."""
    import numpy as np

    return len(rows.stats.hashes) - len(np.unique(rows.stats.hashes))
