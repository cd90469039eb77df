"""LoRA+: the matrices B learn at a rate of their own, which schedules scale and checkpoints leave alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from automodel.models.adapters import LoRA
from automodel.optim.optimizers import adamw, build_optimizer, sgd
from automodel.optim.schedules import cosine
from automodel.tasks.causal_lm import CausalLM
from tests.dist.tiny import VOCAB, tiny_llama

TOKENS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(4)
    return LoRA(rank=4, **options).apply(tiny_llama(), task=CausalLM())


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> dict[str, torch.Tensor]:
    """Return the trained weights after four steps."""
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        schedule.step()
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_steps_equal_those_of_two_groups_made_by_hand(options):
    model = adapted(**options)
    optimizer = build_optimizer(lambda groups: adamw(groups, lr=1e-2, weight_decay=0.1), model, lr_ratio=8)
    got = trained(model, optimizer, cosine(optimizer, 10, warmup_steps=3))

    model = adapted(**options)
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    of_b = [weight for name, weight in named if "lora_B" in name]
    others = [weight for name, weight in named if "lora_B" not in name and weight.ndim == 2]
    vectors = [weight for name, weight in named if weight.ndim == 1]
    groups = [{"params": others, "lr": 1e-2}, {"params": of_b, "lr": 8e-2}]
    groups += [{"params": vectors, "lr": 1e-2, "weight_decay": 0.0}] if vectors else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1, fused=True)
    factors = [1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(3))]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda num_done: factors[num_done])
    expected = trained(model, optimizer, schedule)
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)


def test_the_first_group_has_the_rate_that_is_logged():
    model = adapted()
    optimizer = build_optimizer(lambda groups: sgd(groups, lr=0.5), model, lr_ratio=4)
    schedule = cosine(optimizer, 10, warmup_steps=2)
    assert schedule.get_last_lr() == [0.25, 1.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 1.0]


def test_without_a_ratio_there_is_one_group_and_only_of_what_is_trained():
    model = adapted()
    (group,) = build_optimizer(lambda groups: sgd(groups, lr=0.5), model).param_groups
    assert group["lr"] == 0.5
    assert {id(weight) for weight in group["params"]} == {
        id(weight) for name, weight in model.named_parameters() if "lora_" in name
    }
