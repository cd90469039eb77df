"""Jobs on a real SLURM: two nodes that are two daemons on this machine, brought up for these tests alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.recipes.command import FAST, ROOT, numbers, records, run

TOOL = ROOT.parent / "shared" / "tools" / "local-slurm.sh"
STEPS = ["step_scheduler.max_steps=6", "step_scheduler.global_batch_size=32"]
JOB = ["launch=slurm", "launch.nodes=2", *FAST, *STEPS]
SLOW = "loss_fn._target_=tests.recipes.faulty_losses.Slow"


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Bring the cluster up and give the environment that finds it; take it down at the end."""
    if not TOOL.is_file():
        if os.environ.get("AUTOMODEL_REQUIRE_SHARED"):
            pytest.fail(f"AUTOMODEL_REQUIRE_SHARED is set, but there is no {TOOL}")
        pytest.skip("needs ../shared/tools/local-slurm.sh, which a plain clone does not have")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # its sockets need a short path
    settings = os.environ | {"LOCAL_SLURM_DIR": str(folder / "s"), "LOCAL_SLURM_PORT": str(three_free_ports())}
    try:
        try:
            up = subprocess.run(
                [TOOL, "up", "2"], env=settings, capture_output=True, text=True, timeout=240, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip("SLURM cannot be installed and started here within 240 s")
        if up.returncode:
            pytest.skip(f"SLURM cannot be started here: {up.stderr.strip() or up.stdout.strip()}")
        outside = dict.fromkeys(("SLURM_JOB_ID", "AUTOMODEL_RUN_ID"), "")
        yield outside | {"SLURM_CONF": str(folder / "s" / "slurm.conf")}
    finally:
        subprocess.run([TOOL, "down"], env=settings, capture_output=True, timeout=60, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def three_free_ports() -> int:
    """Return the first of three neighbouring ports that nobody listens on: the controller's and the nodes'."""
    for first in range(10000 + os.getpid() % 4000, 15000, 3):
        sockets = [socket.socket() for _ in range(3)]
        try:
            for number, each in enumerate(sockets):
                each.bind(("", first + number))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    pytest.skip("there are no three neighbouring free ports")


def submit(cluster: dict[str, str], folder: Path, *argv: str) -> str:
    """Submit a run to ``folder`` and return the job's id."""
    output = run(*argv, f"output_dir={folder}", **cluster)
    return re.search(r"submitted job (\d+)", output)[1]


def ask(cluster: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=os.environ | cluster, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def wait_for_end(cluster: dict[str, str], job: str, log: Path, *, state: str = "COMPLETED") -> str:
    """Wait until the job is over, expect its state, and return its log."""
    shown = ""
    for _ in range(1800):
        shown = ask(cluster, "scontrol", "show", "job", job)
        found = re.search(r"JobState=(\w+)", shown)
        if found and found[1] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"):
            break
        time.sleep(0.1)
    text = log.read_text() if log.exists() else ""
    assert f"JobState={state}" in shown, f"{shown}\n{text}"
    return text


def wait_for_steps(run_dir: Path, num_steps: int) -> None:
    for _ in range(1800):
        if (run_dir / "metrics.jsonl").exists() and len(records(run_dir)) >= num_steps:
            return
        time.sleep(0.1)
    pytest.fail(f"{run_dir} did not come to step {num_steps}")


@dataclass
class Signalled:
    """A job that was told to save while it ran, and is requeued by now."""

    job: str
    run_dir: Path

    @property
    def log(self) -> Path:
        return self.run_dir / "slurm" / f"{self.job}.log"


def signal(cluster: dict[str, str], folder: Path, *argv: str) -> Signalled:
    """Submit a job on both nodes, and signal its batch script as SLURM does ahead of the time limit."""
    made = Signalled(submit(cluster, folder, *JOB, SLOW, *argv), folder)
    wait_for_steps(folder, 2)
    ask(cluster, "scancel", "--batch", "--signal=USR1", made.job)
    for _ in range(1800):
        if "requeueing job" in made.log.read_text():
            return made
        time.sleep(0.1)
    pytest.fail(f"was not requeued:\n{made.log.read_text()}")


@pytest.fixture(scope="module")
def signalled(cluster, tmp_path_factory) -> Signalled:
    return signal(cluster, tmp_path_factory.mktemp("signalled") / "run", "launch.nproc_per_node=2")


def test_a_signalled_job_of_two_nodes_saves_and_is_requeued(signalled):
    saved = json.loads((signalled.run_dir / "run.json").read_text())
    assert (saved["ended"]["status"], saved["world_size"], saved["host"]) == ("stopped", 4, "n1")
    assert (signalled.run_dir / "checkpoints" / "latest").resolve().name == f"step_{saved['ended']['step']:08d}"


# What follows happens while SLURM lets that job wait for its second start.


def test_bad_input_is_not_submitted(cluster, tmp_path):
    output = run(*JOB, "optimizer.lr=0", f"output_dir={tmp_path}/one", status=2, **cluster)
    assert "must be more than 0" in output and not (tmp_path / "one").exists()
    output = run(*JOB, "launch.partition=none", f"output_dir={tmp_path}/two", status=2, **cluster)
    assert "sbatch refused the job: sbatch: error:" in output and "partition" in output
    assert not (tmp_path / "two").exists()


def test_a_requeued_job_goes_on_in_its_folder(cluster, signalled, tmp_path):
    run(*FAST, *STEPS, "launch.nproc_per_node=4", f"output_dir={tmp_path}/whole")
    log = wait_for_end(cluster, signalled.job, signalled.log)
    first, second = json.loads((signalled.run_dir / "run.json").read_text())["resumed_from_step"]
    assert first is None and 2 <= second < 6 and f"at step {second}" in log
    whole = records(tmp_path / "whole")
    assert [numbers(r) for r in records(signalled.run_dir)] == [numbers(r) for r in whole]
    assert (signalled.run_dir / "model" / "model.safetensors").is_file()


def test_a_job_of_torchrun_saves_and_is_requeued_and_a_cancelled_one_ends(cluster, tmp_path):
    made = signal(cluster, tmp_path / "run", "launch.template=torchrun", "dataloader.num_workers=1")
    assert json.loads((made.run_dir / "run.json").read_text())["ended"]["status"] == "stopped"
    ask(cluster, "scancel", made.job)
    wait_for_end(cluster, made.job, made.log, state="CANCELLED")


def test_a_cancelled_job_is_not_requeued(cluster, tmp_path):
    job = submit(cluster, tmp_path / "run", *JOB, "launch.nodes=1", SLOW)
    wait_for_steps(tmp_path / "run", 1)
    ask(cluster, "scancel", job)
    log = wait_for_end(cluster, job, tmp_path / "run" / "slurm" / f"{job}.log", state="CANCELLED")
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")) and "requeueing" not in log
