"""A batch knows its counts, moves as one, and reads like a mapping."""

from __future__ import annotations

import pickle

import pytest
import torch

from automodel.data.batches.batch import Batch, as_batch
from automodel.data.batches.collate import CausalLMCollator, PackedCollator, RowTargetCollator

ROWS = [{"input_ids": [5, 6, 7], "labels": [-100, 7, 8]}, {"input_ids": [9, 4], "labels": [4, -100]}]


@pytest.mark.parametrize(
    ("batch", "counts"),
    [
        (CausalLMCollator(0)(ROWS), (3, 5, 9 + 4)),
        (CausalLMCollator(0)([]), (0, 0, 0)),
        (PackedCollator(0)([row | {"position_ids": range(len(row["input_ids"]))} for row in ROWS]), (3, 5, 9 + 4 + 1)),
        (RowTargetCollator(0)([{"input_ids": [1, 2], "labels": 0}]), (1, 2, 4)),
        (RowTargetCollator(0, target=float)([]), (0, 0, 0)),
    ],
)
def test_counts_are_those_of_the_rows(batch, counts):
    assert (batch.num_label_tokens, batch.num_tokens, batch.sum_squared_lengths) == counts


def test_tensors_are_read_by_name():
    batch = CausalLMCollator(0)(ROWS)
    assert list(batch) == ["input_ids", "attention_mask", "labels"] and "loss_weights" not in batch
    assert batch.get("loss_weights", 1) == 1 and {**batch}["labels"] is batch.labels
    with pytest.raises(KeyError):
        batch["no such tensor"]


def test_a_mapping_becomes_a_batch_and_a_batch_stays_itself():
    batch = as_batch({"input_ids": torch.ones(1, 3), "labels": torch.tensor([[1, -100, 2]])})
    assert batch.inputs.keys() == {"input_ids"} and batch.num_label_tokens == 2 and batch.num_tokens == 3
    assert as_batch(batch) is batch


def test_it_moves_as_one_and_keeps_its_counts_and_shared_tensors():
    borders = torch.tensor([0, 3])
    batch = Batch({"a": borders, "b": borders, "longest": 3}, torch.zeros(1), torch.ones(1), 1, 2, 3)
    moved = batch.to(torch.device("meta"))
    assert moved.inputs["a"] is moved.inputs["b"] and moved.inputs["longest"] == 3
    assert {moved[name].device.type for name in ("a", "labels", "loss_weights")} == {"meta"}
    assert (moved.num_label_tokens, moved.num_tokens, moved.sum_squared_lengths) == (1, 2, 3)
    assert pickle.loads(pickle.dumps(batch)).num_tokens == 2  # from a loader's worker
