"""In bf16, gradients of micro-batches and ranks are added up in float32."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from automodel.data.batches.collate import CausalLMCollator
from automodel.data.batches.loader import TrainLoader
from automodel.distributed.parallel.precision import convert_weights_
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from automodel.train.step import StepConfig, train_step
from tests.dist.test_step_parity import GradientCatcher
from tests.dist.tiny import parallel_model, tiny_llama, uneven_rows

NUM_ROWS = 16
RELATIVE = 1e-5  # float32 sums in another order; sums in bf16 were off by 4e-3


def micro_batches_of(dp_rank: int, dp_size: int) -> list[dict[str, torch.Tensor]]:
    loader = TrainLoader(
        uneven_rows(NUM_ROWS), collate=CausalLMCollator(0), global_batch_size=NUM_ROWS, local_batch_size=1,
        dp_rank=dp_rank, dp_size=dp_size, seed=0,
    )  # fmt: skip
    (found,) = loader.steps_of(0)
    return found


def summed_in_double(dp_size: int, is_autocast: bool) -> dict[str, torch.Tensor]:
    """The gradients of each micro-batch as bf16 gives them, alone and from a zeroed gradient, added up in float64."""
    model, sums, num_tokens = tiny_llama(), {}, 0
    if not is_autocast:  # sharded strategies compute with bf16 weights
        convert_weights_(model, torch.bfloat16)
    for rank in range(dp_size):
        for batch in micro_batches_of(rank, dp_size):
            num_tokens += int((batch["labels"] != -100).sum())
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                loss_sum = CrossEntropy()(model, batch)
            loss_sum.backward()
            for name, parameter in model.named_parameters():
                sums[name] = sums.get(name, 0) + parameter.grad.double()
    return {name: total / num_tokens for name, total in sums.items()}


def one_step(strategy_name: str, defer: bool) -> dict[str, torch.Tensor]:
    model, strategy, dp = parallel_model(strategy_name)
    device = torch.device("cpu")
    config = StepConfig(device, dp.group, defer, None, partial(strategy.autocast, device))
    catcher = GradientCatcher(model)
    train_step(
        model,
        micro_batches_of(dp.rank, dp.size),
        objective=as_objective(CrossEntropy()),
        optimizer=catcher,
        config=config,
    )
    return catcher.caught


@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize(
    ("world", "strategy"),
    [(1, "ddp bf16"), (2, "ddp bf16"), (2, "fsdp2 bf16"), (4, "hsdp bf16")],
)
def test_gradients_of_bf16_micro_batches_are_summed_in_float32(ranks, world, strategy, defer):
    (expected,) = ranks[1].run(summed_in_double, world, strategy.startswith("ddp"))
    for got in ranks[world].run(one_step, strategy, defer):
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            assert gradient.dtype == torch.float32
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(gradient.double(), expected[name], rtol=0, atol=RELATIVE * scale, msg=name)
