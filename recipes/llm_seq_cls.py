"""Sequence classification: a label for each text, scored by accuracy and macro F1."""

from __future__ import annotations

from automodel.runner.recipe import Recipe
from automodel.tasks.sequence_classification import SequenceClassification


def recipe() -> Recipe:
    """Describe the recipe ``llm_seq_cls``."""
    return Recipe(task=SequenceClassification())
