"""Under what conditions the model runs: its mode, the computing precision, and the random numbers of each rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.command import FAST, run

NOTING = "loss_fn._target_=tests.recipes.noting_loss.Noting"
LAYOUTS = {
    "ddp": ["distributed=ddp", "distributed.mixed_precision=bf16"],
    "tp": ["distributed=fsdp2", "distributed.tp_size=2", "distributed.mixed_precision=bf16"],
}


@pytest.fixture(scope="module")
def notes(tmp_path_factory) -> dict[str, list[list[dict[str, Any]]]]:
    """What two ranks noted of each call, over three steps of two micro-batches with a validation after each."""
    return {name: _run(tmp_path_factory.mktemp("notes"), layout) for name, layout in LAYOUTS.items()}


def _run(folder: Path, layout: list[str]) -> list[list[dict[str, Any]]]:
    run(
        *FAST, NOTING, *layout, "launch.nproc_per_node=2", "step_scheduler.max_steps=3",
        "step_scheduler.val_every_steps=1", "step_scheduler.global_batch_size=32", "validation_dataset.limit=16",
        "checkpoint.enabled=false", "export.enabled=false", f"output_dir={folder}/run", NOTES=str(folder),
    )  # fmt: skip
    return [[json.loads(line) for line in (folder / f"{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]


def of_kind(calls: list[dict[str, Any]], has_graph: bool) -> list[dict[str, Any]]:
    """Return the calls of training, which alone have a graph for a backward, or those of validation."""
    chosen = [call for call in calls if call["has_graph"] == has_graph]
    assert len(chosen) >= 3
    return chosen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_in_train_mode_also_after_a_validation(notes, layout):
    for calls in notes[layout]:
        assert all(call["modes"] == [True] for call in of_kind(calls, True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_is_without_dropout_and_without_a_graph(notes, layout):
    for calls in notes[layout]:
        assert all(call["modes"] == [False] for call in of_kind(calls, False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_graph", [True, False], ids=["training", "validation"])
def test_the_configured_precision_holds(notes, layout, has_graph):
    for calls in notes[layout]:
        assert {call["dtype"] for call in of_kind(calls, has_graph)} == {"torch.bfloat16"}


def test_data_parallel_ranks_draw_apart(notes):
    one, other = ([call["random_state"] for call in of_kind(calls, True)] for calls in notes["ddp"])
    assert not set(one) & set(other)


def test_the_ranks_of_a_tensor_parallel_group_draw_alike(notes):
    one, other = ([call["random_state"] for call in of_kind(calls, True)] for calls in notes["tp"])
    assert one == other
