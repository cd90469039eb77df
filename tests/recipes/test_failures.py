"""A rank that exits, dies or stalls ends the job soon, and the screen says which one it was."""

from __future__ import annotations

import json
import time
from datetime import datetime

import pytest

from tests.recipes.command import command_line, records

LIMIT_SEC = 15  # what a job may take to end on one node; of a stall, after its time-out
TIMEOUT_MINUTES = 0.2

CASES = {
    # what the last rank does: (what the screen must say, what run.json must say)
    "Exits": (["rank 1 failed in training, step 4: its process ended without a word"], "rank 1: its process ended"),
    "Killed": (
        ["launcher: rank 1 was killed by SIGKILL; the run is ended", "rank 1 failed in training, step 4"],
        "rank 1: its process ended",
    ),
    "Sleeps": (
        ["rank 1 keeps the others waiting", "stalled: rank 0 waited", "did not arrive: rank 1", "time.sleep(600)",
         "late in training, step 4", "waiting in training, step 4", "last collective: gloo:",
         "torchfrtrace -j --prefix rank_"],
        "rank 1: stalled in training, step 4",
    ),
    "Stopped": (
        ["did not arrive: rank 1", "rank 1: no answer at all; the process is stopped", "waiting in training, step 4"],
        "rank 1: stalled in training, step 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault", [case if case == "Killed" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_job_ends_and_names_the_rank(tmp_path, fault):
    folder = tmp_path / "run"
    output = command_line(
        "evaluation=loss", "validation_dataset=none", "dataset.limit=200", "step_scheduler.local_batch_size=8",
        "step_scheduler.log_every_steps=1", "launch.nproc_per_node=2", f"dist_env.timeout_minutes={TIMEOUT_MINUTES}",
        f"loss_fn._target_=tests.recipes.faulty_losses.{fault}", f"output_dir={folder}", status=1,
    )  # fmt: skip
    seconds = time.time() - datetime.fromisoformat(records(folder)[-1]["timestamp"]).timestamp()
    assert seconds < LIMIT_SEC + (60 * TIMEOUT_MINUTES if fault in ("Sleeps", "Stopped") else 0)
    words, ended = CASES[fault]
    for word in words:
        assert word in output
    assert "Traceback" not in output
    assert json.loads((folder / "run.json").read_text())["ended"]["error"].startswith(ended)
    records_left = {"Sleeps": ["rank_0", "rank_1"], "Stopped": ["rank_0"]}.get(fault, [])
    assert sorted(path.name for path in folder.glob("flight_recorder/*")) == records_left


def test_the_first_failing_ranks_traceback_is_the_last_on_the_screen(tmp_path):
    output = command_line(
        "evaluation=loss", "validation_dataset=none", "dataset.limit=200", "step_scheduler.local_batch_size=8",
        "launch.nproc_per_node=2", "distributed=fsdp2", "loss_fn._target_=tests.recipes.faulty_losses.Raises",
        f"output_dir={tmp_path}/run", status=1,
    )  # fmt: skip
    *_, before, last = output.strip().splitlines()
    assert last == "ValueError: this rank went wrong on purpose"
    assert "raise ValueError" in before
    assert output.count("Traceback") == 1
    assert "launcher: the run is ended; in the words of rank 1:" in output
    ended = json.loads((tmp_path / "run" / "run.json").read_text())["ended"]
    assert ended["error"] == "rank 1: ValueError: this rank went wrong on purpose"
