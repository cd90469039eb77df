"""A step is a function of its rows: every layout gives the gradients of one plain process."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from automodel.data.batches.collate import CausalLMCollator
from automodel.data.batches.loader import TrainLoader
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.linear_cross_entropy import LinearCrossEntropy
from automodel.losses.objective import as_objective
from automodel.train.step import StepConfig, train_step
from tests.dist.tiny import clean_name, full, parallel_model, tiny_llama, uneven_rows

# float32 sums in another order; the largest seen was 3e-7.
RELATIVE = 2e-6
LOSSES = {"all logits": CrossEntropy(), "in chunks": LinearCrossEntropy(chunk_size=5)}


class GradientCatcher(torch.optim.Optimizer):
    """Keeps the gradients that a step hands to its optimizer, whole."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self.model, self.caught = model, None

    def step(self) -> None:
        held = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in self.model.parameters()}, "these are not the trained ones"
        self.caught = {clean_name(n): full(p.grad).clone() for n, p in self.model.named_parameters()}


def plain_reference(rows: list[dict], clip_norm: float | None) -> tuple[float, float, dict[str, torch.Tensor]]:
    """The mean loss, gradient norm and clipped gradients, row by row without padding, in one process."""
    model = tiny_llama()
    num_tokens = sum(label != -100 for row in rows for label in row["labels"])
    loss_sum = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        loss = F.cross_entropy(logits, torch.tensor(row["labels"]), reduction="sum")
        (loss / num_tokens).backward()
        loss_sum += loss.item()
    grads = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.sqrt(sum(grad.double().pow(2).sum() for grad in grads.values())).item()
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
    return loss_sum / num_tokens, norm, {name: grad * factor for name, grad in grads.items()}


def one_step(
    strategy_name: str,
    num_rows: int,
    masked: tuple[int, ...],
    local: int,
    accumulation: int,
    defer: bool,
    clip: float,
    loss: str = "in chunks",
) -> tuple[float, float, dict[str, torch.Tensor]]:
    model, _, dp = parallel_model(strategy_name)
    loader = TrainLoader(
        uneven_rows(num_rows, masked=masked),
        collate=CausalLMCollator(0),
        global_batch_size=local * dp.size * accumulation,
        local_batch_size=local,
        dp_rank=dp.rank,
        dp_size=dp.size,
        seed=0,
    )
    config = StepConfig(torch.device("cpu"), dp.group, defer, clip, nullcontext)
    catcher = GradientCatcher(model)
    (micro_batches,) = loader.steps_of(0)
    result = train_step(model, micro_batches, objective=as_objective(LOSSES[loss]), optimizer=catcher, config=config)
    return (result.loss_sum / result.num_label_tokens).item(), result.grad_norm.item(), catcher.caught


def stop_requests(strategy_name: str) -> int:
    model, _, dp = parallel_model(strategy_name)
    config = StepConfig(torch.device("cpu"), dp.group, True, None, nullcontext)
    batch = CausalLMCollator(0)(uneven_rows(1))
    wants_stop = dist.get_rank() == 1
    return train_step(
        model,
        [batch],
        objective=as_objective(CrossEntropy()),
        optimizer=GradientCatcher(model),
        config=config,
        wants_stop=wants_stop,
    ).num_stop_requests


@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (2, "tp2"), (4, "hsdp x tp2")])
def test_every_rank_hears_that_one_was_asked_to_stop(ranks, world, strategy):
    assert ranks[world].run(stop_requests, strategy) == [1] * world


LAYOUTS = {
    1: ("ddp", "fsdp2"),
    2: ("ddp", "fsdp2", "tp2", "tp2 sequence"),
    4: ("ddp", "fsdp2", "hsdp", "tp2", "tp2 sequence", "hsdp x tp2"),
}
CASES = [
    (world, strategy, accumulation, defer)
    for world, strategies in LAYOUTS.items()
    for strategy in strategies
    for accumulation in (1, 3)
    for defer in (True, False)
]


@pytest.mark.parametrize(("world", "strategy", "accumulation", "defer"), CASES)
def test_gradients_equal_one_plain_process(ranks, world, strategy, accumulation, defer):
    dp_size = world // 2 if "tp2" in strategy else world
    local = 12 // (dp_size * accumulation) or 1
    size = local * dp_size * accumulation
    check(ranks, (strategy, size, (1,), local, accumulation, defer, None), world)


@pytest.mark.parametrize(("world", "strategy"), [(w, strategy) for w, names in LAYOUTS.items() for strategy in names])
def test_gradients_from_all_logits_equal_one_plain_process(ranks, world, strategy):
    num_rows = 2 * (world // 2 if "tp2" in strategy else world)
    check(ranks, (strategy, num_rows, (1,), 1, 2, True, None, "all logits"), world)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_short_batches_and_masked_micro_batches_count_by_their_tokens(ranks, world, strategy):
    # 5 rows where 12 fit: ranks run out, and with one row a micro-batch rows 0, 2 and 4 mask whole ones.
    check(ranks, (strategy, 5, (0, 2, 4), 1, 12 // world, True, None), world)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_clipping_brings_the_gradient_to_the_norm(ranks, world, strategy):
    check(ranks, (strategy, 4, (), 4 // world, 1, True, 0.05), world)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_without_supervised_tokens_changes_nothing(two_ranks, strategy):
    results = two_ranks.run(one_step, strategy, 4, (0, 1, 2, 3), 2, 1, True, 1.0)
    for loss_unused, norm, gradients in _tolerant(results):
        assert norm == 0.0 and gradients is None and loss_unused == 0.0


def _tolerant(results):
    return [(0.0 if loss != loss else loss, norm, caught) for loss, norm, caught in results]


def check(ranks, case, world):
    _, num_rows, masked, _, _, _, clip = case[:7]
    ((loss, norm, expected),) = ranks[1].run(plain_reference, uneven_rows(num_rows, masked=masked), clip)
    for got_loss, got_norm, got in ranks[world].run(one_step, *case):
        assert got_loss == pytest.approx(loss, rel=RELATIVE)
        assert got_norm == pytest.approx(norm, rel=RELATIVE)
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=5 * RELATIVE * scale, msg=name)
