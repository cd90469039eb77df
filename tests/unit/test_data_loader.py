"""The rows of a step depend on seed, epoch and global batch size, never on ranks, micro-batches or workers."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from automodel.data.batches.collate import CausalLMCollator, RowTargetCollator
from automodel.data.batches.loader import TrainLoader, ValidationBatches
from automodel.types import UserError

PAD = 0


def make_rows(num_rows: int) -> list[dict]:
    """Rows that can be told by their first token, of different lengths; some end in the pad token's id."""
    return [{"input_ids": [n + 1, *[PAD] * (n % 3)], "labels": [n + 1, *[-100] * (n % 3)]} for n in range(num_rows)]


def loader_of(rows, *, size, local, rank=0, world=1, seed=0, **options) -> TrainLoader:
    return TrainLoader(
        rows, collate=CausalLMCollator(PAD), global_batch_size=size, local_batch_size=local, dp_rank=rank,
        dp_size=world, seed=seed, **options,
    )  # fmt: skip


def row_numbers(batch) -> list[int]:
    """Return the rows of a batch, but for dummies."""
    is_row = (batch["labels"] != -100).any(dim=1)
    return (batch["input_ids"][is_row, 0] - 1).tolist()


def steps_of(rows, *, size, local, world, epoch=0, start_step=0, **options) -> list[list[int]]:
    """Return the rows of every step over all ranks, in the order in which one rank would take them."""
    ranks = [
        list(loader_of(rows, size=size, local=local, rank=rank, world=world, **options).steps_of(epoch, start_step))
        for rank in range(world)
    ]
    steps = []
    for step_of_ranks in zip(*ranks, strict=True):
        assert len({len(micro_batches) for micro_batches in step_of_ranks}) == 1, "ranks differ in micro-batches"
        micro = zip(*step_of_ranks, strict=True)
        steps.append([row for of_ranks in micro for batch in of_ranks for row in row_numbers(batch)])
    return steps


@pytest.mark.parametrize("num_rows", [48, 53, 5])
def test_rows_of_every_step_are_the_same_for_any_number_of_ranks_and_micro_batch_size(num_rows):
    rows = make_rows(num_rows)
    expected = steps_of(rows, size=12, local=12, world=1)
    for world, local in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        if 12 % (world * local) == 0:
            assert steps_of(rows, size=12, local=local, world=world) == expected


def test_every_row_comes_once_an_epoch_and_epochs_and_seeds_differ():
    rows = make_rows(53)
    orders = [
        list(itertools.chain(*steps_of(rows, size=12, local=3, world=4, epoch=epoch, seed=seed)))
        for epoch, seed in [(0, 0), (1, 0), (0, 1), (1, 1)]
    ]
    for order in orders:
        assert sorted(order) == list(range(53))
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_the_same_in_another_process_with_another_hash_seed():
    code = (
        "from automodel.data.batches.loader import TrainLoader\n"
        "loader = TrainLoader([0] * 20, collate=list, global_batch_size=20, local_batch_size=20, dp_rank=0, dp_size=1, "
        "seed=7)\nprint(next(loader.global_batches(3)))"
    )
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(next(loader_of(make_rows(20), size=20, local=20, seed=7).global_batches(3)))


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**80])
def test_any_whole_number_seeds(seed):
    assert sorted(steps_of(make_rows(4), size=4, local=4, world=1, seed=seed)[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_within_an_epoch_gives_the_steps_that_were_left(num_workers):
    rows = make_rows(53)
    whole = steps_of(rows, size=12, local=3, world=2, epoch=2)
    assert steps_of(rows, size=12, local=3, world=2, epoch=2, start_step=3, num_workers=num_workers) == whole[3:]


def test_resuming_reads_no_row_that_was_skipped():
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    list(loader_of(Counting(make_rows(1000)), size=10, local=5).steps_of(0, start_step=98))
    assert Counting.reads == 20


def test_short_last_batch_is_padded_with_dummies_so_that_ranks_agree():
    rows = make_rows(13)  # one row is left for two ranks
    last = [list(loader_of(rows, size=12, local=3, rank=rank, world=2).steps_of(0))[-1] for rank in range(2)]
    assert [len(micro_batches) for micro_batches in last] == [1, 1]
    assert [len(row_numbers(micro_batches[0])) for micro_batches in last] == [1, 0]
    assert last[1][0]["input_ids"].tolist() == [[PAD]]
    assert last[1][0]["attention_mask"].tolist() == [[1]]
    assert last[1][0]["labels"].tolist() == [[-100]]


def test_drop_last_drops_the_short_batch_alone():
    loader = loader_of(make_rows(53), size=12, local=3, drop_last=True)
    assert loader.steps_per_epoch == len(list(loader.steps_of(0))) == 4
    assert loader_of(make_rows(48), size=12, local=3, drop_last=True).steps_per_epoch == 4
    assert loader_of(make_rows(53), size=12, local=3).steps_per_epoch == 5


def test_drop_last_that_leaves_nothing_is_an_error():
    with pytest.raises(UserError, match=r"5 rows do not fill .*global_batch_size=12.*dataloader\.drop_last=true"):
        loader_of(make_rows(5), size=12, local=3, drop_last=True)


@pytest.mark.parametrize("num_rows", [1, 7, 12, 13])
def test_validation_takes_every_row_once_in_order_with_as_many_batches_on_every_rank(num_rows):
    rows = make_rows(num_rows)
    for world, batch_size in itertools.product((1, 2, 3, 4), (1, 2, 5)):
        ranks = [
            list(
                ValidationBatches(
                    rows, collate=CausalLMCollator(PAD), batch_size=batch_size, dp_rank=rank, dp_size=world
                )
            )
            for rank in range(world)
        ]
        taken = [row for of_ranks in zip(*ranks, strict=True) for batch in of_ranks for row in row_numbers(batch)]
        assert taken == list(range(num_rows))


def test_causal_batches_are_padded_on_the_right_with_masks_from_positions():
    batch = CausalLMCollator(pad_token_id=9)(
        [{"input_ids": [5, 9], "labels": [9, -100]}, {"input_ids": [9, 9, 7], "labels": [-100, 7, -100]}]
    )
    assert batch["input_ids"].tolist() == [[5, 9, 9], [9, 9, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[9, -100, -100], [-100, 7, -100]]
    assert {batch[name].dtype for name in batch} == {torch.int64}


def test_classification_batches_hold_a_label_a_row():
    collate = RowTargetCollator(pad_token_id=9)
    batch = collate([{"input_ids": [5], "labels": 2}, {"input_ids": [6, 7], "labels": 0}])
    assert batch["input_ids"].tolist() == [[5, 9], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["labels"].tolist() == [2, 0]
    dummy = collate([])
    assert (dummy["input_ids"].tolist(), dummy["attention_mask"].tolist()) == ([[9]], [[1]])
    assert dummy["labels"].tolist() == [-100]
    assert {each[name].dtype for each in (batch, dummy) for name in each} == {torch.int64}
