"""How each contender of the comparison is started, watched and read: one fresh job of processes for a measurement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from automodel.runs.records import read_records
from benchmarks.cases import Case, Job

ROOT = Path(__file__).parents[1]
OURS = "automodel"
CONTENDERS = {
    OURS: "automodel",
    "automodel-own": "automodel, threads as it chooses",
    "automodel-packed": "automodel, packed",
    "plain": "plain PyTorch loop",
    "trainer": "transformers Trainer",
    "trl": "TRL SFTTrainer",
    "trl-packed": "TRL SFTTrainer, packed",
}
NUM_SKIPPED = 2
"""First steps that no rate counts: memory is allocated in them, and kernels are chosen."""
TIMEOUT_SEC = 3600
ENDING_SEC = 60
WATCH_SEC = 0.2


class ContenderError(Exception):
    """A contender's job failed; the message has its last output."""


@dataclass(frozen=True)
class Measurement:
    """One job of one contender.

    Attributes:
        tokens_per_sec: tokens that are no padding, of all ranks, by wall time, from the end of step ``NUM_SKIPPED`` on.
        first_step_sec: from the start of the first process to the end of the first step.
        peak_mem_gib: the largest resident size of each rank, summed over the ranks.
        num_tokens: of each step.
        losses: the mean loss of the first step, and of all others.
    """

    tokens_per_sec: float
    first_step_sec: float
    peak_mem_gib: float
    num_tokens: list[int]
    losses: tuple[float, float]


def measure(name: str, case: Case, job: Job) -> Measurement:
    """Train ``job`` with the contender ``name`` in fresh processes.

    Raises:
        ContenderError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder_name:
        folder = Path(folder_name)
        is_ours = name.startswith(OURS)
        argv = _our_argv(name, job, folder) if is_ours else _peer_argv(name, job, folder)
        env = _environment(folder)
        if name != "automodel-own":
            env["OMP_NUM_THREADS"] = str(case.num_threads)
        start, peak_mem_gib = time.time(), _run(argv, env, folder / "log.txt", job.num_ranks)
        steps = _our_steps(folder) if is_ours else json.loads((folder / "steps.json").read_text())
    return summarised(steps, start=start, peak_mem_gib=peak_mem_gib)


def summarised(steps: list[dict[str, Any]], *, start: float, peak_mem_gib: float) -> Measurement:
    """Return the measurement of a job.

    Args:
        steps: each with its ``end`` (seconds, as ``time.time``), ``num_tokens``, and ``loss``: of the first the mean
            loss, and of the last that of itself or, where others have no loss, that of all but the first.
        start: of the job, as ``end``.
    """
    counted = sum(step["num_tokens"] for step in steps[NUM_SKIPPED:])
    others = [step["loss"] for step in steps[1:] if "loss" in step]
    return Measurement(
        tokens_per_sec=counted / (steps[-1]["end"] - steps[NUM_SKIPPED - 1]["end"]),
        first_step_sec=steps[0]["end"] - start,
        peak_mem_gib=peak_mem_gib,
        num_tokens=[step["num_tokens"] for step in steps],
        losses=(steps[0]["loss"], sum(others) / len(others)),
    )


def our_config(job: Job) -> dict[str, Any]:
    """Return the configuration that trains ``job`` here; all else has the project's defaults."""
    model = {name: value for name, value in job.model.items() if not name.endswith("_id") and name != "vocab_size"}
    return {
        "model": {"config": model, "tokenizer_name_or_path": job.tokenizer},
        "dataset": {"path": job.rows, "max_length": job.max_length},
        "optimizer": {"lr": job.lr, "weight_decay": 0.0},
        "lr_scheduler": {"warmup_ratio": 0.0},
        "clip_grad_norm": {"max_norm": job.max_grad_norm},
        "rng": {"seed": job.seed},
        "step_scheduler": {
            "global_batch_size": job.global_batch_size,
            "local_batch_size": job.local_batch_size,
            "max_steps": job.num_steps,
        },
        "checkpoint": {"enabled": False},
        "export": {"enabled": False},
    }


def our_arguments(job: Job, folder: Path) -> list[str]:
    """Write the configuration into ``folder`` and return the arguments of ``automodel.run`` that train it there."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(our_config(job)))
    choices = ["model=scratch", "dataset=jsonl", "lr_scheduler=constant"]
    return [str(config), *choices, f"launch.nproc_per_node={job.num_ranks}", f"output_dir={folder / 'run'}"]


def _our_argv(name: str, job: Job, folder: Path) -> list[str]:
    packing = ["packing.enabled=true"] if name == "automodel-packed" else []
    return [sys.executable, "-m", "automodel.run", *our_arguments(job, folder), *packing]


def _our_steps(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "end": datetime.fromisoformat(record["timestamp"]).timestamp(),
            "num_tokens": record["num_tokens"],
            "loss": record["loss"],
        }
        for record in read_records(folder / "run" / "metrics.jsonl", "train")
    ]


def _peer_argv(name: str, job: Job, folder: Path) -> list[str]:
    files = [str(job.save(folder / "job.json")), str(folder / "steps.json")]
    module = ["benchmarks.plain_loop"] if name == "plain" else ["benchmarks.trainers", name]
    start = [sys.executable]
    if job.num_ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.num_ranks}"]
    return [*start, "-m", *module, *files]


def _environment(folder: Path) -> dict[str, str]:
    """Return this process's environment without its thread counts, and with empty caches for prepared rows."""
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    caches = {"AUTOMODEL_CACHE": str(folder / "rows"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    return env | caches | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _run(argv: list[str], env: dict[str, str], log: Path, num_ranks: int) -> float:
    """Run ``argv`` to its end and return the peak memory of its ranks in GiB."""
    with log.open("w") as output:
        process = subprocess.Popen(
            argv, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    peaks: dict[str, int] = {}
    is_done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, num_ranks, peaks, is_done))
    watcher.start()
    try:
        status: Any = process.wait(TIMEOUT_SEC)
    except subprocess.TimeoutExpired:
        status = f"no end after {TIMEOUT_SEC} s"
    finally:
        is_done.set()
        watcher.join()
        _end(process)
    if status != 0:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise ContenderError(f"status {status}: {' '.join(argv)}\n{last}")
    return sum(peaks.values()) / 2**20


def _end(process: subprocess.Popen) -> None:
    """End a job that still runs; its launcher gets the time to end the ranks, which have sessions of their own."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(ENDING_SEC)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _watch(pid: int, num_ranks: int, peaks: dict[str, int], is_done: threading.Event) -> None:
    """Note the peak resident size in KiB of each rank of the job that ``pid`` leads, until ``is_done``.

    From outside, by the kernel's ``VmHWM``, which is what ``ru_maxrss`` reports of a process: it only grows, so nothing
    between two looks is missed.
    """
    while not is_done.wait(WATCH_SEC):
        for each in _tree(pid):
            rank = _rank_of(each) if num_ranks > 1 else "0"
            if rank is not None:
                peaks[rank] = max(peaks.get(rank, 0), _peak_kib(each))


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, _text(children).split())
    return found


def _rank_of(pid: int) -> str | None:
    for variable in _text(Path(f"/proc/{pid}/environ")).split("\0"):
        name, _, value = variable.partition("=")
        if name == "RANK":
            return value
    return None


def _peak_kib(pid: int) -> int:
    for line in _text(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process is gone
        return ""
