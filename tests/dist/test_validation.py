"""Validation does not depend on the number of ranks, uneven and empty shards included."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from automodel.data.batches.batch import Batch
from automodel.data.batches.collate import CausalLMCollator
from automodel.data.batches.loader import ValidationBatches
from automodel.distributed.runtime.agreement import CutShort, StopPoll
from automodel.eval.metrics import ConfusionMatrix
from automodel.eval.validation import Validation, validate
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from tests.dist.tiny import parallel_model, tiny_llama, uneven_rows


def validated(strategy: str, num_rows: int, batch_size: int) -> dict[str, float]:
    model, _, _ = parallel_model(strategy)
    model.train()
    validation = Validation(
        "validation",
        batches=ValidationBatches(
            uneven_rows(num_rows),
            collate=CausalLMCollator(0),
            batch_size=batch_size,
            dp_rank=dist.get_rank(),
            dp_size=dist.get_world_size(),
        ),
        objective=as_objective(CrossEntropy()),
    )
    record = validate(model, validation, device=torch.device("cpu"), dp_group=dist.group.WORLD, autocast=nullcontext)
    assert model.training
    return record


def cut_short(strategy: str) -> tuple[bool, int, bool]:
    model, _, dp = parallel_model(strategy)
    measured = []

    def measure(model, batch):
        measured.append(1)
        return torch.zeros(())

    batches = ValidationBatches(
        uneven_rows(40), collate=CausalLMCollator(0), batch_size=1, dp_rank=dp.rank, dp_size=dp.size
    )
    poll = StopPoll(lambda: dist.get_rank() == 1 and len(measured) >= 2)
    try:
        validate(
            model, Validation("validation", batches, as_objective(measure)),
            device=torch.device("cpu"), dp_group=dp.group, autocast=nullcontext, poll=poll,
        )  # fmt: skip
    except CutShort:
        return True, len(measured), model.training
    return False, len(measured), model.training


@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (2, "tp2"), (4, "hsdp x tp2")])
def test_validation_ends_on_every_rank_when_one_is_asked_to_stop(ranks, world, strategy):
    # Rank 1 hears in its third batch, says so before it, and all act on that before the one after it.
    assert ranks[world].run(cut_short, strategy) == [(True, 3, True)] * world


def plain_loss(num_rows: int) -> tuple[float, int]:
    model, loss_sum, count = tiny_llama().eval(), 0.0, 0
    for row in uneven_rows(num_rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        loss_sum += F.cross_entropy(logits.double(), torch.tensor(row["labels"]), reduction="sum").item()
        count += sum(label != -100 for label in row["labels"])
    return loss_sum / count, count


@pytest.mark.parametrize(("world", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp2"), (4, "ddp"), (4, "hsdp")])
@pytest.mark.parametrize(("num_rows", "batch_size"), [(7, 2), (1, 3)])
def test_validation_equals_one_plain_process(ranks, world, strategy, num_rows, batch_size):
    ((loss, count),) = ranks[1].run(plain_loss, num_rows)
    for record in ranks[world].run(validated, strategy, num_rows, batch_size):
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        assert record["num_label_tokens"] == count


def test_accuracy_and_macro_f1_by_hand():
    truths, predictions = [0, 0, 1, 1, 2, -100], [0, 1, 1, 1, 0, 2]

    matrix = ConfusionMatrix(4)
    batch = Batch({}, torch.tensor(truths))
    sums = matrix.update(F.one_hot(torch.tensor(predictions), 4).float(), batch)
    metrics = matrix.summarize({name: value.double() for name, value in sums.items()})
    # label 0: precision 1/2, recall 1/2; label 1: 2/3 and 1; label 2: 0; label 3 never occurs
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["macro_f1"] == pytest.approx((0.5 + 0.8 + 0.0) / 3)
