"""What would train wrongly, found in prepared rows before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from automodel.data.prepare.prepared import PreparedRows
from automodel.data.prepare.unused import listed, media_fields
from automodel.logs import get_logger, warn_for_all
from automodel.types import UserError

if TYPE_CHECKING:
    import numpy as np

log = get_logger(__name__)

DataChecks = Literal["auto", "strict", "warn"]

MOST_UNSUPERVISED = 0.05
"""The share of rows that may lose everything they would teach."""
MOST_LOST = 0.2
"""The largest share of rows that may be left out for any reason, requested or not."""
SURELY_WRONG = 0.9
"""From this share on, it cannot be meant."""


class Problem(NamedTuple):
    """What would train wrongly, and whether that is sure, or could be meant (a short test run, say)."""

    text: str
    is_sure: bool


def data_problems(train: PreparedRows, validation: PreparedRows | None = None) -> list[Problem]:
    """Return what would train wrongly.

    That is: rows that are lost; rows that belong to images; no row that teaches to end an answer; rows of the
    validation set that are trained on.
    """
    stats = train.stats
    problems = row_problems(train)
    if train.has_answers and len(stats.has_end) and not stats.has_end.any():
        are_all_cut = train.counts.num_truncated == len(stats.has_end)
        remedy = "check the chat template's end of turn"
        if are_all_cut:
            of_model = "the model's limit cuts every row; take a model for longer ones"
            remedy = of_model if train.is_model_limit else "raise dataset.max_length"
        text = (
            f"{train.name}: no row supervises a token that ends an answer, so the model would learn never to stop; "
            f"{remedy}"
        )
        problems.append(Problem(text, is_sure=not are_all_cut))
    if validation is not None:
        problems += shared_problems(train, validation)
    return problems


def _limit(rows: PreparedRows) -> str:
    """Say what bounds the length of a row, and how to lift it."""
    if rows.is_model_limit:
        return "the model's limit (dataset.max_length allows more); take a model for longer rows"
    return "dataset.max_length; raise it"


def row_problems(rows: PreparedRows) -> list[Problem]:
    """Return what is wrong with what became of the rows: too many are lost, or they speak of what nobody sees."""
    name, counts, problems = rows.name, rows.counts, []
    of = max(1, counts.num_rows_read)
    num_lost = counts.num_dropped + counts.num_bad
    if counts.num_unsupervised / of > MOST_UNSUPERVISED or num_lost / of > MOST_LOST:
        limit = _limit(rows)
        reasons = {
            f"are longer than {limit}, or cut them with dataset.truncation=right or left": (
                counts.num_dropped - counts.num_unsupervised
            ),
            f"have no supervised token left within {limit}, keep the ends with dataset.truncation=left, or drop what "
            "is too long with dataset.truncation=drop": counts.num_unsupervised,
            "are damaged and skipped; dataset.on_bad_row=stop names them": counts.num_bad,
        }
        causes = " - ".join(f"{num:,} {reason}" for reason, num in reasons.items() if num)
        text = (
            f"{name}: {num_lost:,} of {counts.num_rows_read:,} rows ({num_lost / of:.0%}) are not trained on: {causes}"
        )
        problems.append(Problem(text, is_sure=num_lost / of >= SURELY_WRONG))
    media = media_fields(counts.unused)
    if media:
        held = listed({field: counts.unused[field] for field in media}, counts.num_rows_read)
        text = (
            f"{name}: rows hold {held}, which no recipe reads, so the model would learn to speak of what it cannot "
            "see or hear; leave these rows out, or take the field out where the text needs it not"
        )
        problems.append(Problem(text, is_sure=False))
    return problems


def shared_problems(train: PreparedRows, validation: PreparedRows) -> list[Problem]:
    """Return that rows are validated on which are trained on as well, if so."""
    num_shared = len(shared_rows(train, validation))
    if not num_shared:
        return []
    text = (
        f"{num_shared:,} of the {len(validation.examples):,} rows of {validation.name} are trained on as well "
        f"({train.name}), so that validation would measure memory; take them out of one of the two"
    )
    return [Problem(text, is_sure=False)]


def settle(problems: list[Problem], policy: DataChecks) -> None:
    """Warn of problems, or raise those that the policy stops at: ``auto`` the sure ones, ``strict`` all."""
    fatal = [problem.text for problem in problems if policy == "strict" or (policy == "auto" and problem.is_sure)]
    if fatal:
        raise UserError(*fatal, "data_checks=warn trains all the same; python -m automodel.preview shows the rows")
    for problem in problems:
        warn_for_all(log, "%s", problem.text)


def shared_rows(train: PreparedRows, validation: PreparedRows) -> np.ndarray:
    """Return the indices of the validation rows that are training rows as well; int64."""
    import numpy as np

    return np.flatnonzero(np.isin(validation.stats.hashes, train.stats.hashes))


def num_duplicates(rows: PreparedRows) -> int:
    """Return how many rows repeat an earlier one, both in tokens and labels."""
    import numpy as np

    return len(rows.stats.hashes) - len(np.unique(rows.stats.hashes))
