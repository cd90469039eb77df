"""A regression head: a number for each text, learned by squared error. A task and a row format of its own."""

from typing import NamedTuple

import torch

from automodel.data.batches.collate import RowTargetCollator
from automodel.data.formats.row_format import RowFormat
from automodel.data.prepare.prepare_row import prepare_input
from automodel.losses.cross_entropy import forward_logits
from automodel.models.hf import pad_token_id
from automodel.runner.recipe import Recipe
from automodel.tasks.task import Task


class Scored(NamedTuple):
    text: str
    score: float


class ScoredFormat(RowFormat):
    sample = Scored
    required = ("text", "score")

    def read(self, columns, row):
        return Scored(columns.text(row, "text"), float(columns.value(row, "score")))


class Regression(Task):
    peft_type = "SEQ_CLS"
    has_new_head = True
    samples = (Scored,)

    def auto_class(self):
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def configure(self, config, tokenizer):
        config.num_labels, config.problem_type, config.pad_token_id = 1, "regression", pad_token_id(tokenizer)

    def columns(self, *, keeps_prompts):
        return {"input_ids": "ids", "labels": "float"}

    def prepare(self, sample, tokenizer, options, *, keeps_prompts):
        return prepare_input(sample.text, tokenizer, options, labels=sample.score)

    def collator(self, tokenizer, length_multiple):
        return RowTargetCollator(pad_token_id(tokenizer), length_multiple, float)


def squared_error(model: torch.nn.Module, batch):
    return ((forward_logits(model, batch)[:, 0].float() - batch.labels).square() * (batch.labels != -100)).sum()


def recipe() -> Recipe:
    return Recipe(Regression(), lambda parts: squared_error)
