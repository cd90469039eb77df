"""The local launcher with real workers, which need no torch: statuses, restarts, signals, and who dies with whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from automodel.launch.local import LocalLaunch

ROOT = Path(__file__).parents[2]
WORKER = "tests.unit.launched_worker"
LAUNCH = (
    "import sys; from automodel.launch.local import LocalLaunch; "
    f"sys.exit(LocalLaunch(nproc_per_node=2).run({WORKER!r}, sys.argv[1:]))"
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("AUTOMODEL_RUN_ID", raising=False)


def starts(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("rank-*-start-*"))


def start_launcher(how: str, folder: Path) -> subprocess.Popen:
    """Start the launcher in a process of its own, and wait until both workers wait for a signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, how, str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_for(folder, "rank-*-ready", process)
    return process


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        if len(list(folder.glob(pattern))) == 2:
            return
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"there are not two files {pattern} in {folder}")


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait_until_gone(folder: Path) -> None:
    pids = [int(file.read_text().split()[-1]) for file in folder.glob("rank-*-start-*")]
    assert len(pids) == 2
    for _ in range(100):
        if not any(is_running(pid) for pid in pids):
            return
        time.sleep(0.1)
    pytest.fail("a worker outlived its launcher")


@pytest.mark.parametrize("status", [0, 2, 75])
def test_a_deliberate_end_is_the_runs_status_and_restarts_nothing(tmp_path, status):
    launch = LocalLaunch(nproc_per_node=2, max_restarts=1)
    assert launch.run(WORKER, [str(status), str(tmp_path)]) == status
    assert starts(tmp_path) == ["rank-0-start-0", "rank-1-start-0"]


def test_a_crash_is_told_with_one_traceback_and_the_rank(tmp_path, capfd):
    assert LocalLaunch(nproc_per_node=2).run(WORKER, ["raise", str(tmp_path)]) == 1
    told = capfd.readouterr().err
    assert told.count("Traceback (most recent call last)") == 1
    assert "ValueError: went wrong on purpose" in told
    assert told.splitlines()[-1] == "launcher: rank 1 failed with status 1; the run is ended"


def test_a_killed_worker_is_told_by_its_signal(tmp_path, capfd):
    assert LocalLaunch(nproc_per_node=2).run(WORKER, ["killed", str(tmp_path)]) == 1
    assert capfd.readouterr().err.splitlines() == ["launcher: rank 1 was killed by SIGKILL; the run is ended"]


def test_a_crash_is_restarted_as_the_same_run(tmp_path):
    assert LocalLaunch(nproc_per_node=2, max_restarts=1).run(WORKER, ["raise-once", str(tmp_path)]) == 0
    assert starts(tmp_path) == [f"rank-{rank}-start-{attempt}" for rank in (0, 1) for attempt in (0, 1)]
    assert len({file.read_text().split()[0] for file in tmp_path.glob("rank-*-start-*")}) == 1


def test_the_launcher_leaves_its_own_process_as_it_was(tmp_path):
    before = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    LocalLaunch().run(WORKER, ["0", str(tmp_path)])
    assert (dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(("cores", "threads"), [(8, "4"), (1, "1")])
def test_the_cores_are_shared_out(tmp_path, monkeypatch, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    LocalLaunch(nproc_per_node=2).run(WORKER, ["0", str(tmp_path)])
    assert {file.read_text().split()[1] for file in tmp_path.glob("rank-*-start-*")} == {threads}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_workers_and_their_saving_is_waited_for(tmp_path, number):
    process = start_launcher("wait", tmp_path)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert len(list(tmp_path.glob("rank-*-signalled"))) == 2
    assert told == f"launcher: stopped by {number.name}\n"


def test_a_second_interrupt_ends_launcher_and_workers_at_once(tmp_path):
    process = start_launcher("stubborn", tmp_path)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path, "rank-*-signalled", process)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert time.monotonic() - began < 15  # the agent would wait for 30 s before it kills
    assert process.returncode == 1
    assert "Traceback" not in told and "interrupted again" in told
    wait_until_gone(tmp_path)


def test_workers_die_with_a_launcher_that_is_killed(tmp_path):
    process = start_launcher("stubborn", tmp_path)
    process.kill()
    process.communicate(timeout=60)
    wait_until_gone(tmp_path)


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    for how in ("0", "raise"):
        LocalLaunch(nproc_per_node=2).run(WORKER, [how, str(tmp_path)])
    assert list((tmp_path / "system").iterdir()) == []
