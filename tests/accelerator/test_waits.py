"""The host never waits for an accelerator but where it must: for a logged line, and once an evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

TRIED = ("2.13",)
LAYOUTS = [
    "fsdp2, padded", "fsdp2, packed", "fsdp2, all logits", "fsdp2, selective", "fsdp2, on the host", "fsdp2, muon",
    "ddp alone", "ddp", "ddp, on the host",
]  # fmt: skip
LOGGED_STEPS, VALIDATIONS = 2, 1  # of three steps, the first and the last

TORCHS_OWN = {"ddp": 2}

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(TRIED),
    reason=f"the invented accelerator takes private functions of torch, tried with {', '.join(TRIED)} alone; "
    f"this is {torch.__version__}",
)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.accelerator.cases"], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def waits(results: dict[str, Any], case: str) -> list[dict[str, Any]]:
    assert "error" not in results[case], results[case]["error"]
    return results[case]["waits"]


def within(found: list[dict[str, Any]], caller: str) -> list[dict[str, Any]]:
    return [wait for wait in found if caller in wait["callers"]]


@pytest.mark.parametrize("case", LAYOUTS)
def test_no_step_waits_for_the_device(results, case):
    assert results[case]["is_fused"]
    found = within(waits(results, case), "train/step.py:train_step")
    # In its first step, DDP reads the order of its buckets back.
    assert len(found) == TORCHS_OWN.get(case, 0) and all(wait["step"] == 1 for wait in found), found


def test_a_split_vocabulary_adds_no_wait(results):
    found = within(waits(results, "fsdp2 tp 2"), "train/step.py:train_step")
    # torch's split embedding sets the ids of other ranks to 0 by a mask, which CUDA does without waiting.
    assert {wait["what"] for wait in found} == {"the shape of index_put_ depends on values"}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_loop_waits_for_its_logged_lines_and_at_the_end(results, case):
    found = waits(results, case)
    logged, evaluated, ended = (
        within(found, caller)
        for caller in ("train/loop.py:_log", "eval/validation.py:validate", "train/loop.py:_read_flag")
    )
    assert len(found) == len(logged) + len(evaluated) + len(ended) + TORCHS_OWN.get(case, 0), found
    # A line reads the loss and the norm, and how long the steps took.
    assert len(logged) == 3 * LOGGED_STEPS and len(evaluated) == VALIDATIONS and len(ended) <= 1, found


def test_the_scores_of_a_classifier_are_read_once_too(results):
    assert len(waits(results, "classification")) == 1


def test_the_documented_functions_do_not_wait_for_a_count_that_the_host_knows(results):
    assert waits(results, "documented functions") == []


@pytest.mark.parametrize("case", LAYOUTS)
def test_whoever_watches_a_wait_takes_it_for_one(results, case):
    assert [wait for wait in waits(results, case) if not wait["is_seen"]] == []


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_time_of_steps_is_the_devices(results, case):
    waits(results, case)
    times = [record["step_time_sec"] for record in results[case]["records"] if record["kind"] == "train"]
    assert times == [0.25] * LOGGED_STEPS  # what the device says it took


def test_an_offloaded_optimizer_waits_for_the_flag_on_which_it_skips(results):
    found = within(waits(results, "fsdp2, offloaded"), "train/step.py:_step_unless")
    assert len(found) == 3 and all(wait["is_seen"] for wait in found)
