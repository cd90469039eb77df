"""The run directory, its lock, and the loggers that write into it."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from automodel.launch.run_id import default_run_id
from automodel.loggers.fanout import open_loggers
from automodel.loggers.jsonl import JsonlLogger
from automodel.runs import run_lock
from automodel.runs.run_folder import RunDir
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


@pytest.fixture
def without_locks(monkeypatch):
    """Make the file system one that cannot lock, in the way that the test sets."""

    def refuse(number: int) -> None:
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL", "EPERM", "EIO"])
def test_a_file_system_without_locks_still_has_one_writer(tmp_path, without_locks, caplog, name):
    without_locks(getattr(errno, name))
    run_dir = RunDir.open(tmp_path / "run")
    assert "its file system has no locks" in caplog.text and ".lock.owner" in caplog.text
    assert f"is in use by another run (process {os.getpid()} on" in opened_by_another_process(tmp_path / "run")
    run_dir.release()
    assert not (tmp_path / "run" / ".lock.owner").exists()
    assert opened_by_another_process(tmp_path / "run") is None


def sign_for_another_node(path: Path, beats: int = 0) -> None:
    there = {"pid": 1, "host": "node7", "space": "node7/pid:[1]", "job_id": "41", "token": "its"}
    path.write_text(json.dumps(there) + f"\n{beats}\n")


def test_without_locks_an_owner_is_dead_once_it_gives_no_sign_of_life(tmp_path, without_locks, monkeypatch):
    without_locks(errno.ENOSYS)
    monkeypatch.setattr(run_lock, "STALE_SEC", 0.5)
    owner = tmp_path / ".lock.owner"
    sign_for_another_node(owner)
    is_over = threading.Event()

    def beat() -> None:
        for beats in range(1, 10):
            time.sleep(0.1)
            sign_for_another_node(owner, beats)
        is_over.set()

    threading.Thread(target=beat).start()
    run_dir = RunDir.open(tmp_path, wait_sec=60)
    assert is_over.is_set()
    assert json.loads(owner.read_text().splitlines()[0])["pid"] == os.getpid()
    run_dir.release()


def test_without_locks_a_process_that_ended_here_owns_nothing(tmp_path, without_locks):
    without_locks(errno.ENOSYS)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: (RunDir.open(tmp_path), os._exit(1)))
    process.start()
    process.join()
    assert (tmp_path / ".lock.owner").exists()
    RunDir.open(tmp_path, wait_sec=10).release()


def test_a_lock_does_not_outvote_an_owner_that_could_not_lock(tmp_path, without_locks, monkeypatch):
    without_locks(errno.ENOLCK)
    run_dir = RunDir.open(tmp_path)
    monkeypatch.undo()  # the other process can lock
    assert "is in use by another run" in opened_by_another_process(tmp_path)
    run_dir.release()


def hold_for_a_moment(path: Path, is_held, holder: dict[str, object]) -> None:
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(json.dumps(holder))
        file.flush()
        is_held.set()
        time.sleep(1)


@pytest.mark.parametrize("case", ["another node", "an earlier start of this job", "a requeue"])
def test_a_lock_that_a_dead_node_leaves_is_waited_for_and_that_is_told(tmp_path, monkeypatch, caplog, case):
    # The process that holds it lives, as a node's lock does until the file server has noticed.
    here = json.loads(json.dumps(vars(run_lock.Holder.this_process())))
    holder = here | ({"host": "node7", "space": "node7/pid:[1]"} if case == "another node" else {"job_id": "41"})
    monkeypatch.setenv("SLURM_JOB_ID", "42" if case == "a requeue" else "41")
    if case == "a requeue":
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    process = context.Process(target=hold_for_a_moment, args=(tmp_path / ".lock", is_held, holder))
    process.start()
    is_held.wait()
    RunDir.open(tmp_path, wait_sec=60).release()
    process.join()
    assert "which may have ended with its node; waiting up to 60 s for it" in caplog.text


def test_a_lock_that_is_not_given_up_is_waited_for_so_long_and_not_longer(tmp_path, monkeypatch):
    holder = vars(run_lock.Holder.this_process()) | {"space": "node7/pid:[1]", "host": "node7"}
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    process = context.Process(target=hold_for_a_moment, args=(tmp_path / ".lock", is_held, holder))
    process.start()
    is_held.wait()
    with pytest.raises(UserError, match=r"in use by another run \(process \d+ on node7.*, still after 0 s"):
        RunDir.open(tmp_path, wait_sec=0.2)
    process.join()


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


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (STEP, "7"),
        (STEP | {"SLURM_STEP_ID": "3"}, "7.3"),
        (STEP | {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
        ({"TORCHELASTIC_RUN_ID": "abc"}, "abc"),
        ({"AUTOMODEL_RUN_ID": "mine", "SLURM_JOB_ID": "7"}, "mine"),
    ],
)
def test_the_run_id_is_the_jobs(env, expected):
    assert default_run_id(env) == expected


def test_without_a_job_the_run_id_is_new_each_time():
    assert default_run_id({}) != default_run_id({"TORCHELASTIC_RUN_ID": "none"})


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"},  # a batch script
        {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_PROCID": "0"},
        STEP | {"SLURM_PTY_PORT": "40000"},  # a shell of srun --pty
        STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # a shell of salloc
        STEP | {"RANK": "0", "TORCHELASTIC_RUN_ID": "none"},  # torchrun started by srun
    ],
)
def test_two_runs_in_one_allocation_get_ids_of_their_own(env):
    assert default_run_id(env) != default_run_id(env)
