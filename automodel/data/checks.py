"""What would train wrongly, found in prepared rows before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from automodel.data.rows import SFTRows

if TYPE_CHECKING:
    import numpy as np

MOST_UNSUPERVISED = 0.05
"""The share of rows that may lose everything they would teach."""


def data_problems(train: SFTRows, validation: SFTRows | None = None) -> list[str]:
    """Return what would train wrongly, a line each.

    That is: more than a few rows of which nothing supervised is left; no row that teaches to end an answer; rows
    of the validation set that are trained on.
    """
    counts = train.counts
    problems = []
    share = counts.num_unsupervised / max(1, counts.num_rows_read)
    if share > MOST_UNSUPERVISED:
        problems.append(
            f"{train.name}: {counts.num_unsupervised:,} of {counts.num_rows_read:,} rows ({share:.0%}) have no "
            "supervised token left within dataset.max_length; raise it, keep the ends with dataset.truncation=left, "
            "or drop what is too long with dataset.truncation=drop"
        )
    if train.format_name != "text" and len(train.stats.has_end) and not train.stats.has_end.any():
        problems.append(
            f"{train.name}: no row supervises a token that ends an answer, so the model would learn never to stop; "
            "look at the chat template's end of turn, or raise dataset.max_length"
        )
    if validation is not None:
        num_shared = len(shared_rows(train, validation))
        if num_shared:
            problems.append(
                f"{num_shared:,} of the {len(validation.examples):,} rows of {validation.name} are trained on as well "
                f"({train.name}), so that validation would measure memory; take them out of one of the two"
            )
    return problems


def shared_rows(train: SFTRows, validation: SFTRows) -> np.ndarray:
    """Return the numbers of the validation rows that are training rows as well; int64."""
    import numpy as np

    return np.flatnonzero(np.isin(validation.stats.hashes, train.stats.hashes))


def num_duplicates(rows: SFTRows) -> int:
    """Return how many rows are there already, tokens and labels alike."""
    import numpy as np

    return len(rows.stats.hashes) - len(np.unique(rows.stats.hashes))
