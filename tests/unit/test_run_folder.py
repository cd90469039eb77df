"""The run directory, its lock, and the loggers that write into it."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from automodel.launch.run_id import default_run_id
from automodel.loggers.fanout import open_loggers
from automodel.loggers.jsonl import JsonlLogger
from automodel.loggers.rundir import RunDir
from automodel.types import UserError


def open_in_child(path: Path, queue) -> None:
    try:
        RunDir.open(path)
        queue.put(None)
    except UserError as error:
        queue.put(str(error))


def opened_by_another_process(path: Path) -> str | None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=open_in_child, args=(path, queue))
    process.start()
    process.join()
    return queue.get()


def test_a_run_directory_has_one_writer(tmp_path):
    run_dir = RunDir.open(tmp_path / "run")
    assert "is in use by another run (process" in opened_by_another_process(tmp_path / "run")
    run_dir.release()
    assert opened_by_another_process(tmp_path / "run") is None


def test_abandoning_leaves_no_trace(tmp_path):
    RunDir.open(tmp_path / "a" / "b" / "run").abandon()
    assert list(tmp_path.iterdir()) == []


def test_abandoning_keeps_what_was_there(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    RunDir.open(folder).abandon()
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RunDir.open(tmp_path / "file" / "run")


def test_the_record_keeps_every_start(tmp_path):
    run_dir = RunDir.open(tmp_path / "run")
    run_dir.start_record(run_id="x", resumed_from_step=None)
    run_dir.update_record(ended={"status": "stopped"})
    run_dir.start_record(run_id="x", resumed_from_step=4)
    record = json.loads(run_dir.run_json_path.read_text())
    assert record["resumed_from_step"] == [None, 4] and record["ended"] is None


def test_metrics_are_whole_lines_at_full_precision(tmp_path):
    run_dir = RunDir.open(tmp_path / "run")
    sink = JsonlLogger().open(run_dir, run_id="x", config={})
    sink.log({"kind": "train", "loss": 0.1 + 0.2, "bad": float("nan")})
    text = run_dir.metrics_path.read_text()  # written at once, before it is closed
    assert json.loads(text) == {"kind": "train", "loss": 0.1 + 0.2, "bad": None}
    sink.log({"kind": "train"})
    run_dir.cut_metrics(len(text))
    assert run_dir.metrics_path.read_text() == text


class BrokenLogger:
    def open(self, run_dir, *, run_id, config):
        return self

    def log(self, record):
        raise OSError("no space left on device")

    def close(self):
        pass


def test_a_logger_that_fails_is_left_out_and_the_others_go_on(tmp_path, caplog):
    run_dir = RunDir.open(tmp_path / "run")
    loggers = {"broken": BrokenLogger(), "jsonl": JsonlLogger()}
    sink = open_loggers(loggers, run_dir, run_id="x", config={}, is_main=True)
    with caplog.at_level("WARNING", logger="automodel"):
        sink.log({"kind": "train", "step": 1})
        sink.log({"kind": "train", "step": 2})
        sink.close()
    assert len(run_dir.metrics_path.read_text().splitlines()) == 2


def test_other_ranks_log_nothing(tmp_path):
    sink = open_loggers({"jsonl": JsonlLogger()}, RunDir(tmp_path), run_id="x", config={}, is_main=False)
    sink.log({"kind": "train"})
    sink.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
        ({"TORCHELASTIC_RUN_ID": "abc"}, "abc"),
        ({"AUTOMODEL_RUN_ID": "mine", "SLURM_JOB_ID": "7"}, "mine"),
    ],
)
def test_the_run_id_is_the_jobs(env, expected):
    assert default_run_id(env) == expected


def test_without_a_job_the_run_id_is_new_each_time():
    assert default_run_id({}) != default_run_id({"TORCHELASTIC_RUN_ID": "none"})
