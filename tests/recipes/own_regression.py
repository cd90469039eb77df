"""What a user writes to train a score for each text: a row format, a task, an objective and the recipe."""

from dataclasses import dataclass
from typing import NamedTuple

from automodel.data.formats.row_format import RowFormat
from automodel.data.prepare.prepare_row import prepare_input
from automodel.runner.recipe import Recipe
from automodel.tasks.task import Task
from automodel.types import IGNORE_INDEX


class TextScore(NamedTuple):
    text: str
    score: float


class ScoreFormat(RowFormat):
    sample = TextScore
    required = ("text", "score")

    def read(self, columns, row):
        return TextScore(columns.text(row, "text"), columns.number(row, "score"))


@dataclass(frozen=True)
class Regression(Task):
    peft_type = "SEQ_CLS"
    has_new_head = True
    samples = (TextScore,)

    def auto_class(self):
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def configure(self, config, tokenizer):
        config.num_labels = 1
        config.problem_type = "regression"
        config.pad_token_id = tokenizer.pad_token_id

    def columns(self, *, keeps_prompts):
        return {"input_ids": "ids", "labels": "float"}

    def prepare(self, sample, tokenizer, options, *, keeps_prompts):
        return prepare_input(sample.text, tokenizer, options, labels=sample.score)

    def collator(self, tokenizer, length_multiple):
        from automodel.data.batches.collate import RowTargetCollator

        return RowTargetCollator(tokenizer.pad_token_id, length_multiple)


def squared_error(model, batch):
    errors = model(**batch.inputs).logits[:, 0].float() - batch.labels
    return (errors.square() * (batch.labels != IGNORE_INDEX)).sum()


def recipe():
    return Recipe(task=Regression(), objective=lambda parts: squared_error)
