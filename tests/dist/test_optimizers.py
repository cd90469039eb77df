"""Optimizers beside AdamW and SGD: their formulas, and the same numbers in every layout that they take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from automodel.optim.muon import orthogonal
from automodel.optim.optimizers import adafactor, muon, parameter_groups
from automodel.types import UserError
from tests.dist.tiny import clean_name, full, parallel_model, tiny_llama

BUILDERS = {"muon": muon, "adafactor": adafactor}
# Three steps from gradients summed in another order; the largest seen was 3e-5, of Muon.
RELATIVE = 2e-4


def trained(strategy: str, optimizer_name: str) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    """Return the losses of three steps, the weights after them, and the names of the parameters with momentum."""
    model, layout, _ = parallel_model(strategy)
    optimizer = BUILDERS[optimizer_name](parameter_groups(model), lr=1e-2, weight_decay=0.1)
    layout.prepare_optimizer(optimizer, model)
    ids, losses = torch.arange(3, 11).reshape(1, 8), []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {clean_name(name): full(parameter).detach() for name, parameter in model.named_parameters()}
    hidden = [clean_name(n) for n, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]]
    return losses, weights, hidden


@pytest.mark.parametrize(
    ("world", "strategy", "name"),
    [(2, "ddp", "muon"), (2, "fsdp2", "muon"), (4, "hsdp", "muon"), (2, "tp2", "muon"), (4, "hsdp x tp2", "muon"),
     (2, "ddp", "adafactor")],
)  # fmt: skip
def test_the_layout_changes_no_step(ranks, world, strategy, name):
    ((losses, weights, hidden),) = ranks[1].run(trained, "ddp", name)
    for got in ranks[world].run(trained, strategy, name):
        assert got[0] == pytest.approx(losses, rel=1e-5)
        assert got[2] == hidden
        for key, weight in weights.items():
            assert ((got[1][key] - weight).norm() / weight.norm()).item() < RELATIVE, key


def test_muon_takes_the_matrices_of_the_layers_alone(one_rank):
    (_, _, hidden), *_ = one_rank.run(trained, "ddp", "muon")
    assert len(hidden) == 2 * 7 and all(".layers." in name and name.endswith("proj.weight") for name in hidden)


def exact(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration on the singular values alone, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_the_update_has_the_singular_values_of_the_paper(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(matrix).double(), exact(matrix), rtol=1e-4, atol=1e-5)


def muon_step(is_bad: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Any]]:
    """Return a matrix before and after a step, a vector's change, and the momentum."""
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.ones(4))
    optimizer = muon([{"params": [matrix], "is_hidden": True}, {"params": [vector], "weight_decay": 0.0}],
                     lr=0.1, weight_decay=0.5)  # fmt: skip
    before = matrix.detach().clone()
    matrix.grad, vector.grad = torch.randn(6, 4), torch.ones(4)
    if is_bad is not None:
        matrix.grad.fill_(float("nan"))
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(is_bad)
    optimizer.step()
    return before, matrix.detach(), vector.detach(), [optimizer.state[matrix]["momentum_buffer"], matrix.grad]


def test_a_step_is_decay_and_the_scaled_direction_and_adamw_for_vectors():
    before, after, vector, (average, gradient) = muon_step(None)
    torch.testing.assert_close(average, 0.05 * gradient)
    direction = exact(gradient * 0.05 + 0.95 * average).float()
    torch.testing.assert_close(after, before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * direction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vector, torch.full((4,), 0.9))  # AdamW's first step is the rate


def test_a_bad_step_changes_nothing():
    before, after, vector, (average, _) = muon_step(1.0)
    assert torch.equal(before, after) and torch.equal(vector, torch.ones(4)) and not average.any()


def test_adamw_of_8_bits_trains_as_adamw_does():
    pytest.importorskip("bitsandbytes")
    from automodel.optim.optimizers import adamw, adamw_8bit

    losses = {}
    for build in (adamw, adamw_8bit):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1))
        optimizer = build(parameter_groups(model), lr=1e-2)
        rows = torch.randn(32, 64)
        for _ in range(20):
            loss = F.mse_loss(model(rows), rows.sum(1, keepdim=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[build] = loss.item()
    state = optimizer.state[model[0].weight]
    assert state["state1"].dtype == torch.uint8
    assert losses[adamw_8bit] == pytest.approx(losses[adamw], rel=0.1)


def test_an_optimizer_of_8_bits_says_what_it_lacks(monkeypatch):
    from automodel.optim import optimizers

    cfg = SimpleNamespace(
        distributed={"_target_": "automodel.distributed.FSDP2"},
        optimizer={"_target_": "automodel.optim.optimizers.adamw_8bit"},
    )
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    told = list(optimizers.adamw_8bit.problems({}, cfg, key="optimizer", world_size=1))
    assert "adamw_8bit does not take the sharded weights of distributed=fsdp2: choose distributed=ddp" in told[0]
    assert "needs the package bitsandbytes: pip install 'automodel[8bit]'" in told[1]
    with pytest.raises(UserError, match="has no kernel for meta"):
        optimizers.adamw_8bit([{"params": [nn.Parameter(torch.ones(1, device="meta"))]}])


def test_groups_mark_the_matrices_of_layers_and_keep_their_decay():
    marked = [group for group in parameter_groups(tiny_llama()) if group.get("is_hidden")]
    assert [len(group["params"]) for group in marked] == [14] and "weight_decay" not in marked[0]
