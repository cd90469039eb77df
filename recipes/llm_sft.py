"""Supervised fine-tuning of a causal language model: only the answers are trained on."""

from __future__ import annotations

from automodel.runner.recipe import Recipe
from automodel.tasks.causal_lm import CausalLM


def recipe() -> Recipe:
    """Describe the recipe ``llm_sft``."""
    return Recipe(task=CausalLM())
