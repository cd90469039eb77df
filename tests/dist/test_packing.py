"""A step over packed rows gives the gradients of one plain process, and every layout shows that they stay apart."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from automodel.data.batches.collate import PackedCollator
from automodel.data.batches.loader import TrainLoader
from automodel.data.batches.packing import PackedRows, pack
from automodel.distributed.runtime.agreement import run_on_all_ranks
from automodel.losses.cross_entropy import CrossEntropy, forward_logits
from automodel.losses.objective import as_objective
from automodel.models.isolation import require_isolation
from automodel.train.step import StepConfig, train_step
from automodel.types import UserError
from tests.dist.test_step_parity import RELATIVE, GradientCatcher, plain_reference
from tests.dist.tiny import VOCAB, parallel_model, uneven_rows

NUM_ROWS, MAX_LENGTH = 17, 30  # 5 packs: in 2 micro-batches of 2 ranks, of which the last rank runs out


def packed_step(strategy_name: str, local: int) -> tuple[float, float, dict[str, torch.Tensor], tuple[int, int]]:
    model, strategy, dp = parallel_model(strategy_name)
    rows = uneven_rows(NUM_ROWS, masked=(1,))
    packed = PackedRows(rows, pack(np.array([len(row["input_ids"]) for row in rows]), MAX_LENGTH))
    loader = TrainLoader(
        packed,
        collate=PackedCollator(0, strategy.length_multiple),
        global_batch_size=8,
        local_batch_size=local,
        dp_rank=dp.rank,
        dp_size=dp.size,
        seed=0,
    )
    config = StepConfig(torch.device("cpu"), dp.group, True, None, nullcontext)
    require_isolation(
        model,
        collate=loader.collate,
        forward=forward_logits,
        vocab_size=VOCAB,
        device=config.device,
        autocast=nullcontext,
        attention="sdpa",
    )
    catcher = GradientCatcher(model)  # what an optimizer built now would update
    (micro_batches,) = loader.steps_of(0)
    result = train_step(model, micro_batches, objective=as_objective(CrossEntropy()), optimizer=catcher, config=config)
    loss_mean = (result.loss_sum / result.num_label_tokens).item()
    return loss_mean, result.grad_norm.item(), catcher.caught, (result.num_label_tokens, result.num_tokens)


@pytest.mark.parametrize("local", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tp2", "tp2 sequence"])
def test_packed_gradients_equal_one_plain_process(one_rank, two_ranks, strategy, local):
    rows = uneven_rows(NUM_ROWS, masked=(1,))
    ((loss, norm, expected),) = one_rank.run(plain_reference, rows, None)
    num_supervised = sum(label != -100 for row in rows for label in row["labels"])
    num_tokens = sum(len(row["input_ids"]) for row in rows)
    for got_loss, got_norm, got, counts in two_ranks.run(packed_step, strategy, local):
        assert counts == (num_supervised, num_tokens)
        assert got_loss == pytest.approx(loss, rel=RELATIVE)
        assert got_norm == pytest.approx(norm, rel=RELATIVE)
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=5 * RELATIVE * scale, msg=name)


def isolation_verdict(strategy_name: str, leaks: bool) -> tuple[str, bool]:
    """Return the refusal, if any, and whether the model still trains after it."""
    model, strategy, _ = parallel_model(strategy_name)

    def forward(model, batch):
        mask = {"attention_mask": torch.ones_like(batch["input_ids"])} if leaks else {}
        return forward_logits(model, replace(batch, inputs=batch.inputs | mask))

    def check() -> None:
        require_isolation(
            model,
            collate=PackedCollator(0, strategy.length_multiple),
            forward=forward,
            vocab_size=VOCAB,
            device=torch.device("cpu"),
            autocast=nullcontext,
            attention="sdpa",
        )

    try:
        run_on_all_ranks(check)
    except UserError as error:
        return str(error), model.training
    return "", model.training


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tp2", "tp2 sequence", "zero3"])
def test_isolation_is_judged_alike_on_every_rank(two_ranks, strategy):
    assert two_ranks.run(isolation_verdict, strategy, False) == [("", True)] * 2
    verdicts = two_ranks.run(isolation_verdict, strategy, True)
    assert verdicts[0] == verdicts[1]
    assert "does not keep packed documents apart" in verdicts[0][0] and verdicts[0][1]
