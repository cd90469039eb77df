"""The number of threads and their way of waiting are chosen before torch is loaded, never over the user's choice."""

from __future__ import annotations

import json
import os

import pytest

from automodel.launch.threads import thread_variables
from tests.recipes.command import FAST, ROOT, command_line


def test_cores_are_shared_out_and_threads_do_not_spin_for_long(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert thread_variables({}, num_ranks=2) == {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": "10000"}
    assert thread_variables({}, num_ranks=16)["OMP_NUM_THREADS"] == "1"


def test_what_the_user_exported_is_kept():
    assert thread_variables({"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}, num_ranks=1) == {}
    assert "GOMP_SPINCOUNT" not in thread_variables({"GOMP_SPINCOUNT": "5"}, num_ranks=1)


@pytest.mark.parametrize(
    ("record", "expected"), [({"num_threads": 5}, "5"), ({"num_threads": "many"}, "8"), ({}, "8"), ([], "8")]
)
def test_a_resumed_run_keeps_its_number_of_threads(tmp_path, monkeypatch, record, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert thread_variables({}, num_ranks=1, output_dir=str(tmp_path))["OMP_NUM_THREADS"] == expected


def test_a_run_records_the_threads_that_it_computes_with(tmp_path):
    run = [*FAST, "step_scheduler.max_steps=1", f"output_dir={tmp_path}/run"]
    command_line(*run, "export.enabled=false", cwd=ROOT, OMP_NUM_THREADS="1")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_threads"] == 1
