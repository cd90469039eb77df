"""Knowledge distillation (Hinton et al. 2015): answers are learned from labels and from a teacher's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from automodel.losses.cross_entropy import cross_entropy_sum, forward_logits
from automodel.losses.objective import Sums
from automodel.runner.recipe import Recipe
from automodel.tasks.causal_lm import CausalLM


@dataclass(frozen=True)
class Distillation:
    teacher: torch.nn.Module
    temperature: float
    kl_weight: float

    def __call__(self, model, batch):
        logits = forward_logits(model, batch)
        with torch.no_grad():
            target = (forward_logits(self.teacher, batch).float() / self.temperature).log_softmax(dim=-1)
        given = (logits.float() / self.temperature).log_softmax(dim=-1)
        terms = (target.exp() * (target - given)).sum(dim=-1) * self.temperature**2
        kl = (terms * (batch.labels != -100)).sum()
        cross_entropy = cross_entropy_sum(logits, batch.labels)
        loss = (1 - self.kl_weight) * cross_entropy + self.kl_weight * kl
        return Sums(loss, {"cross_entropy": cross_entropy, "kl": kl})


def recipe(*, teacher: dict[str, Any], temperature: float = 2.0, kl_weight: float = 0.5) -> Recipe:
    return Recipe(
        CausalLM(),
        lambda parts: Distillation(parts.frozen["teacher"], temperature, kl_weight),
        frozen_models={"teacher": teacher},
    )
