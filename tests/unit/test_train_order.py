"""Grouped, budgeted and mixed order: a function of seed, epoch and global batch alone, whatever the ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from automodel.data.batches.collate import CausalLMCollator
from automodel.data.batches.loader import EpochRows, TrainLoader
from automodel.data.batches.mixture import MixtureDataset
from automodel.types import UserError

LENGTHS = np.random.default_rng(0).integers(2, 60, size=203)


def make_rows(lengths: np.ndarray) -> list[dict]:
    return [
        {"input_ids": [number + 1] * length, "labels": [1] * (length - 1) + [-100]}
        for number, length in enumerate(lengths.tolist())
    ]


ROWS = make_rows(LENGTHS)


def loader_of(rank: int = 0, world: int = 1, **options) -> TrainLoader:
    options = {"global_batch_size": 12, "local_batch_size": 1, "seed": 0, "num_epochs": 2} | options
    return TrainLoader(
        ROWS, collate=CausalLMCollator(0), dp_rank=rank, dp_size=world, lengths=LENGTHS, **options
    )  # fmt: skip


def rows_of(batch) -> list[int]:
    return (batch["input_ids"][(batch["labels"] != -100).any(dim=1), 0] - 1).tolist()


def global_batches(world: int, **options) -> list[list[int]]:
    """Return the sorted rows of every step over all ranks."""
    steps = zip(*(list(loader_of(rank, world, **options)) for rank in range(world)), strict=True)
    out = []
    for of_ranks in steps:
        assert len({len(micro) for micro in of_ranks}) == 1, "ranks differ in micro-batches"
        out.append(sorted(row for micro in of_ranks for batch in micro for row in rows_of(batch)))
    return out


WAYS = {
    "plain": {},
    "sorted": {"sort_within_step": True},
    "grouped": {"length_grouped": True},
    "budget": {"max_tokens_per_batch": 128},
    "grouped, budget": {"length_grouped": True, "max_tokens_per_batch": 100},
    "drawn": {"draw": EpochRows([100, 103], [30, 120], seed=3), "num_drawn": 150},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_number_of_ranks_and_workers_takes_the_same_global_batches(way):
    expected = global_batches(1, **WAYS[way])
    for world in (2, 3, 4):
        assert global_batches(world, **WAYS[way]) == expected
    assert global_batches(2, num_workers=2, **WAYS[way]) == expected


@pytest.mark.parametrize("way", [way for way in WAYS if way != "drawn"])
def test_an_epoch_holds_every_row_once(way):
    steps = global_batches(3, **WAYS[way])
    for epoch in (steps[:17], steps[17:]):
        assert sorted(itertools.chain(*epoch)) == list(range(203))
    assert steps[:17] != steps[17:]


@pytest.mark.parametrize("way", WAYS)
def test_a_saved_place_is_taken_up_by_any_number_of_ranks(way):
    whole = global_batches(2, **WAYS[way])
    for num_done in (1, 9, 17, 20):
        before = loader_of(0, 2, **WAYS[way])
        list(itertools.islice(before, num_done))
        for world in (1, 4):
            rest = []
            for rank in range(world):
                after = loader_of(rank, world, **WAYS[way])
                after.load_state_dict(before.state_dict())
                rest.append(list(after))
            joined = [
                sorted(row for micro in step for batch in micro for row in rows_of(batch))
                for step in zip(*rest, strict=True)
            ]
            assert joined == whole[num_done:]


def test_the_place_is_that_of_the_steps_yielded_and_not_of_those_read_ahead():
    loader = loader_of(num_workers=2)
    list(itertools.islice(loader, 3))
    assert loader.state_dict() == {"epoch": 0, "num_rows": 36}
    assert not loader.is_exhausted


def padding(**options) -> float:
    batches = [batch for step in loader_of(**options) for batch in step]
    return 1 - sum(int(b["attention_mask"].sum()) for b in batches) / sum(b["input_ids"].numel() for b in batches)


def test_grouping_by_length_pads_less():
    assert padding(local_batch_size=12, length_grouped=True) < 0.3 * padding(local_batch_size=12)


def test_rows_of_a_step_are_dealt_by_length_the_longest_first():
    assert padding(local_batch_size=3, sort_within_step=True) < 0.5 * padding(local_batch_size=3)
    for of_ranks in zip(
        *(loader_of(rank, 2, local_batch_size=3, sort_within_step=True) for rank in (0, 1)), strict=True
    ):
        lengths = [LENGTHS[row] for micro in zip(*of_ranks, strict=True) for batch in micro for row in rows_of(batch)]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("budget", [64, 100, 500])
def test_a_micro_batch_keeps_within_its_tokens(budget):
    for step in loader_of(0, 2, max_tokens_per_batch=budget):
        for batch in step:
            assert batch["input_ids"].numel() <= budget


def test_a_row_longer_than_the_tokens_of_a_micro_batch_goes_alone():
    sizes = {batch["input_ids"].shape[0] for step in loader_of(max_tokens_per_batch=10) for batch in step}
    assert max(batch["input_ids"].shape[1] for step in loader_of(max_tokens_per_batch=10) for batch in step) == 59
    assert sizes <= {1, 2, 3, 4, 5}


def test_a_source_is_gone_through_evenly_over_the_epochs():
    draw = EpochRows([10, 7], [4, 9], seed=1)
    first = np.concatenate([draw(epoch)[:4] for epoch in range(5)])  # two passes of ten
    second = np.concatenate([draw(epoch)[4:] for epoch in range(7)])  # nine passes of seven
    assert np.bincount(first, minlength=10).tolist() == [2] * 10
    assert np.bincount(second - 10, minlength=7).tolist() == [9] * 7
    assert len(draw) == 13 and draw(0).tolist() == EpochRows([10, 7], [4, 9], seed=1)(0).tolist()
    assert draw(0).tolist() != EpochRows([10, 7], [4, 9], seed=2)(0).tolist()


SIZES = {"a": 100, "b": 300}


@pytest.mark.parametrize(
    ("keys", "temperature", "expected"),
    [
        ({"a": {}, "b": {}}, None, {"a": 100, "b": 300}),
        ({"a": {"weight": 1}, "b": {"weight": 1}}, None, {"a": 200, "b": 200}),
        ({"a": {"weight": 0.9}, "b": {"weight": 0.1}}, None, {"a": 360, "b": 40}),
        ({"a": {"epochs": 1.5}, "b": {}}, None, {"a": 150, "b": 300}),
        ({"a": {"epochs": 2}, "b": {"epochs": 0.1}}, None, {"a": 200, "b": 30}),
        ({"a": {}, "b": {}}, 1.0, {"a": 100, "b": 300}),
        ({"a": {}, "b": {}}, 2.0, {"a": 146, "b": 254}),  # 400 x sqrt(100) / (sqrt(100) + sqrt(300)) = 146.4
        ({"a": {}, "b": {}}, 1e9, {"a": 200, "b": 200}),
    ],
)
def test_the_shares_of_a_mixture(keys, temperature, expected):
    assert MixtureDataset(sources=keys, temperature=temperature).num_drawn(SIZES) == expected


@pytest.mark.parametrize(
    ("keys", "temperature", "message"),
    [
        ({"a": {"weight": 1}, "b": {}}, None, "some have a weight, but not b"),
        ({"a": {"weight": 1}, "b": {"epochs": 1}}, None, "one kind alone"),
        ({"a": {"weight": 1}, "b": {"weight": 1}}, 2.0, "one kind alone"),
        ({"a": {"weight": 0}, "b": {"weight": 1}}, None, "dataset.sources.a.weight=0 must be a number above 0"),
        ({"a": {"epochs": "x"}, "b": {}}, None, "dataset.sources.a.epochs=x must be a number above 0"),
        ({"a": {}, "b": {}}, -1.0, "dataset.temperature=-1.0 must be above 0"),
    ],
)
def test_shares_that_cannot_be_are_told(keys, temperature, message):
    with pytest.raises(UserError, match=message):
        MixtureDataset(sources=keys, temperature=temperature).num_drawn(SIZES)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "has no sources"),
        ({"a": {"path": "x", "kind": "csv"}}, "dataset.sources.a.kind=csv: there are file, jsonl, hf, demo"),
        ({"a": {"pth": "x"}}, "dataset.sources.a.pth is not a key of a file source; did you mean path"),
        ({"a": {}}, "dataset.sources.a.path is required"),
        ({"a": {"path": "x", "streaming": True}}, "draws from whole sets"),
    ],
)
def test_sources_that_cannot_be_are_told(sources, message):
    with pytest.raises(UserError, match=message):
        MixtureDataset(sources=sources).parts()
