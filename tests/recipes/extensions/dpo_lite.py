"""DPO (Rafailov et al. 2023). A batch holds the chosen answers of its rows, then the rejected ones."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from automodel.data.formats.samples import Messages, Preference
from automodel.losses.cross_entropy import forward_logits
from automodel.losses.objective import Sums
from automodel.runner.recipe import Recipe
from automodel.tasks.causal_lm import CausalLM
from automodel.tasks.task import Task

REJECTED = {"input_ids": "rejected_ids", "labels": "rejected_labels"}


class Pairs(CausalLM):
    samples = (Preference,)
    can_stream, is_generative, examples = False, False, Task.examples

    def columns(self, *, keeps_prompts):
        return dict.fromkeys((*REJECTED, *REJECTED.values()), "ids")

    def prepare(self, sample, tokenizer, options, *, keeps_prompts):
        sides = (Messages(sample.prompt + side, sample.tools) for side in (sample.chosen, sample.rejected))
        chosen, other = (super(Pairs, self).prepare(side, tokenizer, options, keeps_prompts=False) for side in sides)
        if chosen.record is None or other.record is None:
            return chosen if chosen.record is None else other
        return chosen._replace(record=chosen.record | {name: other.record[of] for of, name in REJECTED.items()})

    def collator(self, tokenizer, length_multiple):
        pad = super().collator(tokenizer, length_multiple)
        return lambda rows: pad([*rows, *({of: row[name] for of, name in REJECTED.items()} for row in rows)])


@dataclass
class DPO:
    reference: torch.nn.Module
    beta: float

    count = staticmethod(lambda batch: len(batch.labels) // 2)  # 0 for the dummy of one row

    def __call__(self, model, batch):
        with torch.no_grad():
            before = log_probs(self.reference, batch)
        ratios = self.beta * (log_probs(model, batch) - before)
        margins = ratios[: self.count(batch)] - ratios[len(ratios) - self.count(batch) :]
        loss = -F.logsigmoid(margins).sum() + 0 * ratios.sum()  # the dummy needs a gradient too
        return Sums(loss, {"margin": margins.sum(), "accuracy": (margins > 0).sum()})


def log_probs(model, batch):
    logits = forward_logits(model, batch).float().transpose(1, 2)
    return -F.cross_entropy(logits, batch.labels, reduction="none").sum(dim=1)


def recipe(*, beta: float = 0.1) -> Recipe:
    return Recipe(Pairs(), lambda parts: DPO(parts.frozen["reference"], beta), frozen_models={"reference": None})
