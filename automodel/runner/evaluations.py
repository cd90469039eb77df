"""What is measured on the validation rows of a recipe: the objective, and the scores of generated answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from automodel.data.batches.loader import Collate, ValidationBatches
from automodel.distributed.runtime.agreement import StopPoll
from automodel.eval.generation import GenerationScores
from automodel.eval.scorers import EXACT_MATCH
from automodel.eval.validation import Validation, validate
from automodel.losses.objective import Objective
from automodel.runner.build import build
from automodel.runner.job import Job
from automodel.train.loop import Evaluator


class ValidationSet:
    """The validation rows of a run, measured during training.

    Attributes:
        scores: what every evaluation of generated answers gave, in turn.
    """

    name = "validation"

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        data: Any,
        objective: Objective,
        collate: Collate,
    ) -> None:
        self._job, self._model, self._tokenizer, self._data = job, model, tokenizer, data
        self._generation = build(job.cfg.evaluation)
        self.scores: list[GenerationScores] = []
        batches = ValidationBatches(
            data.validation.examples,
            collate=collate,
            batch_size=job.cfg.step_scheduler.local_batch_size,
            dp_rank=job.dp.rank,
            dp_size=job.dp.size,
        )
        self._validation = Validation(self.name, batches, objective, data.task.metrics())

    def evaluator(self) -> Evaluator:
        """Return what the loop runs."""
        return Evaluator(self.name, self._run)

    def _run(self, poll: StopPoll) -> dict[str, Any]:
        job = self._job
        record = validate(self._model, self._validation, **job.forward_place, poll=poll)
        if self._generation is None:
            return record
        with job.autocast():
            scores = self._generation.run(
                self._model,
                self._tokenizer,
                prompts=self._data.validation.prompts,
                **job.forward_place,
                stops=self._data.stops,
                poll=poll,
            )
        self.scores.append(scores)
        return record | scores.metrics()


def score_tables(scores: list[GenerationScores]) -> list[Table]:
    """Return the first and last scores side by side, and some of the last answers."""
    first, last = scores[0], scores[-1]
    table = Table("exact match", "before", "after")
    for kind in last.by_kind:
        table.add_row(kind, f"{first.by_kind[kind]:.2f}", f"{last.by_kind[kind]:.2f}")
    table.add_row("all", f"{first.means[EXACT_MATCH]:.2f}", f"{last.means[EXACT_MATCH]:.2f}")
    for name in list(last.means)[1:]:
        table.add_row(f"[{name}]", f"{first.means[name]:.2f}", f"{last.means[name]:.2f}")
    answers = Table("held-out question", "right answer", "the model's answer")
    for question, right, answer in last.samples:
        answers.add_row(question.strip(), right.strip(), answer.strip())
    return [table, answers]


def share_table(train_set: Any) -> Table:
    """Return what each source gives to an epoch."""
    total = sum(share.num_tokens for share in train_set.shares)
    table = Table("source", "rows", "drawn", "share", "tokens", "share", "slots filled")
    for share in train_set.shares:
        table.add_row(
            Path(share.name).name,
            f"{share.num_rows:,}",
            f"{share.num_drawn:,}",
            f"{share.num_drawn / train_set.num_drawn:.1%}",
            f"{share.num_tokens:,.0f}",
            f"{share.num_tokens / total:.1%}",
            "" if share.efficiency is None else f"{share.efficiency:.1%}",
        )
    return table
