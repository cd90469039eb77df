"""Prepared rows for tests, as a language model's recipe and a classifier's get them."""

from __future__ import annotations

import dataclasses
from typing import Any

from automodel.data.prepare.load import load_rows
from automodel.data.prepare.prepared import PreparedRows
from automodel.tasks.causal_lm import CausalLM
from automodel.tasks.sequence_classification import SequenceClassification


def load_sft(source: Any, tokenizer: Any, *, model_max_length: int | None, keeps_prompts: bool = True) -> PreparedRows:
    return load_rows(source, tokenizer, CausalLM(), model_max_length=model_max_length, keeps_prompts=keeps_prompts)


def load_classification(
    source: Any,
    tokenizer: Any,
    *,
    model_max_length: int | None,
    known: Any = None,
    set_aside: Any = None,
    head_labels: tuple[str, ...] = (),
) -> PreparedRows:
    task = SequenceClassification() if known is None else known.task
    rows = load_rows(source, tokenizer, task, model_max_length=model_max_length)
    if known is not None:
        return rows
    others = [set_aside] if set_aside is not None else []
    aside = [load_rows(each, tokenizer, task, model_max_length=model_max_length) for each in others]
    return dataclasses.replace(rows, task=task.fitted([rows, *aside], head_labels=head_labels))
