"""Direct preference optimisation (Rafailov et al. 2023) against the model as it was before training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from automodel.data.formats.messages import Messages
from automodel.losses.cross_entropy import forward_logits
from automodel.losses.objective import Sums
from automodel.runner.recipe import Recipe
from automodel.tasks.causal_lm import CausalLM
from automodel.tasks.task import Task


@dataclass(frozen=True)
class Pairs(CausalLM):
    """Rows of a chosen and a rejected answer; a batch holds all chosen ones first, then the rejected ones."""

    formats = ("preference",)
    can_stream = is_generative = False
    examples = Task.examples

    def columns(self, *, keeps_prompts):
        return dict.fromkeys(("input_ids", "labels", "rejected_ids", "rejected_labels"), "ids")

    def prepare(self, sample, tokenizer, options, *, keeps_prompts):
        sides = [Messages(sample.prompt + side, sample.tools) for side in (sample.chosen, sample.rejected)]
        chosen, rejected = (super(Pairs, self).prepare(side, tokenizer, options, keeps_prompts=False) for side in sides)
        if chosen.record is None or rejected.record is None:
            return chosen if chosen.record is None else rejected
        other = {"rejected_ids": rejected.record["input_ids"], "rejected_labels": rejected.record["labels"]}
        return chosen._replace(record=chosen.record | other)

    def collator(self, tokenizer, length_multiple):
        pad, dummy = super().collator(tokenizer, length_multiple), {"input_ids": [0], "labels": [-100]}
        return lambda rows: pad(
            [*rows, *({"input_ids": row["rejected_ids"], "labels": row["rejected_labels"]} for row in rows)]
            or [dummy, dummy]
        )


@dataclass(frozen=True)
class DPO:
    reference: torch.nn.Module
    beta: float

    def count(self, batch):
        return len(batch.labels) // 2 if batch.num_label_tokens else 0

    def __call__(self, model, batch):
        with torch.no_grad():
            before = log_probs(self.reference, batch)
        chosen, rejected = (log_probs(model, batch) - before).chunk(2)
        margins, is_pair = self.beta * (chosen - rejected), (batch.labels.chunk(2)[0] != -100).any(dim=1)
        hits = ((margins > 0) & is_pair).sum()
        return Sums(-(F.logsigmoid(margins) * is_pair).sum(), {"margin": margins[is_pair].sum(), "accuracy": hits})


def log_probs(model, batch):
    """Return the log-probability of each row's answer, [B]."""
    logs = forward_logits(model, batch).float().log_softmax(dim=-1)
    picked = logs.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    return (picked * (batch.labels != -100)).sum(dim=-1)


def recipe(*, beta: float = 0.1) -> Recipe:
    return Recipe(Pairs(), lambda parts: DPO(parts.frozen["reference"], beta), frozen_models={"reference": None})
