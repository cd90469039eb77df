"""Jobs on a real SLURM: two nodes that are two daemons on this machine, brought up for these tests alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from automodel.config.choices import quoted
from tests.recipes.command import FAST, ROOT, numbers, records, run, wait_for_steps

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
    output = run(*argv, f"output_dir={quoted(str(folder))}", **cluster)
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


@dataclass
class Job:
    """A job that was submitted."""

    id: str
    run_dir: Path

    @property
    def log(self) -> Path:
        return self.run_dir / "slurm" / f"{self.id}.log"

    def record(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "run.json").read_text())


@pytest.fixture(scope="module")
def whole(cluster, tmp_path_factory) -> list[dict[str, Any]]:
    """The records of a run that nothing interrupts, of four ranks on one machine."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    plain = "loss_fn=cross_entropy"  # which the jobs' slow loss computes; sums in chunks differ in the last bits
    run(*FAST, *STEPS, plain, "launch.nproc_per_node=4", f"output_dir={folder}")
    return [numbers(record) for record in records(folder)]


@pytest.fixture(scope="module")
def signalled(cluster, tmp_path_factory) -> dict[str, Job]:
    """A job of each template on both nodes whose batch script was signalled, as SLURM does ahead of the time limit.

    They are requeued by now. What a shell would make of the folders' names must not happen.
    """
    folder, jobs = tmp_path_factory.mktemp("signalled"), {}
    for template, num_ranks in (("srun", 2), ("torchrun", 1)):
        run_dir = folder / f'it\'s; a $(touch pwned) `touch pwned` "{template}"'
        layout = [f"launch.template={template}", f"launch.nproc_per_node={num_ranks}", "dataloader.num_workers=1"]
        jobs[template] = Job(submit(cluster, run_dir, *JOB, SLOW, *layout), run_dir)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: signal_job(cluster, job), jobs.values()))
    return jobs


def signal_job(cluster: dict[str, str], job: Job) -> None:
    wait_for_steps(job.run_dir, 2)
    ask(cluster, "scancel", "--batch", "--signal=USR1", job.id)
    until(lambda: "requeueing job" in job.log.read_text(), job.log.read_text)


def until(is_so: Callable[[], bool], shown: Callable[[], str]) -> None:
    """Wait until something is so; ``shown`` gives the words where it never is."""
    for _ in range(1800):
        if is_so():
            return
        time.sleep(0.1)
    pytest.fail(shown())


@pytest.mark.slow
@pytest.mark.parametrize(("template", "num_ranks"), [("srun", 4), ("torchrun", 2)])
def test_a_signalled_job_of_two_nodes_saves_and_is_requeued(signalled, template, num_ranks):
    job = signalled[template]
    saved = job.record()
    assert (saved["ended"]["status"], saved["world_size"], saved["host"]) == ("stopped", num_ranks, "n1")
    assert (job.run_dir / "checkpoints" / "latest").resolve().name == f"step_{saved['ended']['step']:08d}"
    assert yaml.safe_load((job.run_dir / "config.yaml").read_text())["output_dir"] == str(job.run_dir)


# What follows happens while SLURM lets those jobs wait for their second start.


def test_bad_input_is_not_submitted(cluster, tmp_path):
    output = run(*JOB, "optimizer.lr=0", f"output_dir={tmp_path}/one", status=2, **cluster)
    assert "must be more than 0" in output and not (tmp_path / "one").exists()
    output = run(*JOB, "launch.partition=none", f"output_dir={tmp_path}/two", status=2, **cluster)
    assert "sbatch refused the job: sbatch: error:" in output and "partition" in output
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
@pytest.mark.parametrize("template", ["srun", "torchrun"])
def test_a_requeued_job_goes_on_in_its_folder(cluster, signalled, whole, template):
    job = signalled[template]
    log = wait_for_end(cluster, job.id, job.log)
    first, second = job.record()["resumed_from_step"]
    assert first is None and 2 <= second < 6 and f"at step {second}" in log
    expect_same(job, whole, is_exact=template == "srun")
    assert (job.run_dir / "model" / "model.safetensors").is_file()
    assert not (ROOT / "pwned").exists()  # the ranks run there


def expect_same(job: Job, whole: list[dict[str, Any]], *, is_exact: bool) -> None:
    """Expect every step once, with the numbers of ``whole``; those of two ranks are sums in another order."""
    found = [numbers(record) for record in records(job.run_dir)]
    assert [one["step"] for one in found] == [one["step"] for one in whole]
    for one, other in zip(found, whole, strict=True):
        assert one == (other if is_exact else pytest.approx(other, rel=1e-5))


def test_a_job_whose_node_goes_down_goes_on_from_its_newest_checkpoint(cluster, whole, tmp_path):
    run_dir = tmp_path / "run"
    argv = [*JOB, "launch.nodes=1", SLOW, "step_scheduler.ckpt_every_steps=1"]
    job = Job(submit(cluster, run_dir, *argv), run_dir)
    wait_for_steps(run_dir, 2)
    node = ask(cluster, "squeue", "-h", "-j", job.id, "-o", "%N").strip()
    ask(cluster, "scontrol", "update", f"nodename={node}", "state=down", "reason=a test")
    wait_for_end(cluster, job.id, job.log)
    ask(cluster, "scontrol", "update", f"nodename={node}", "state=resume")
    first, second = job.record()["resumed_from_step"]
    assert first is None and 1 <= second < 6
    expect_same(job, whole, is_exact=False)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_which_is_not_requeued(cluster, tmp_path):
    run_dir = tmp_path / "run"
    job = Job(submit(cluster, run_dir, *JOB, SLOW, "step_scheduler.max_steps=99"), run_dir)
    wait_for_steps(run_dir, 1)
    os.kill(process_of(job, rank=1), signal.SIGKILL)
    began = time.monotonic()
    log = wait_for_end(cluster, job.id, job.log, state="FAILED")
    assert time.monotonic() - began < 60  # and not the minutes that collectives may take
    assert "srun: error: n2: task 1: Killed" in log and "requeueing" not in log
    assert job.record()["ended"]["status"] == "failed"


def process_of(job: Job, *, rank: int) -> int:
    wanted = {f"SLURM_PROCID={rank}".encode(), f"SLURM_JOB_ID={job.id}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_rank = wanted <= set((process / "environ").read_bytes().split(b"\0"))
            if is_rank and b"automodel.run" in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:
            continue
    pytest.fail(f"there is no process of rank {rank}")


@pytest.mark.slow
def test_a_cancelled_job_is_not_requeued(cluster, tmp_path):
    job = submit(cluster, tmp_path / "run", *JOB, "launch.nodes=1", SLOW)
    wait_for_steps(tmp_path / "run", 1)
    ask(cluster, "scancel", job)
    log = wait_for_end(cluster, job, tmp_path / "run" / "slurm" / f"{job}.log", state="CANCELLED")
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")) and "requeueing" not in log
