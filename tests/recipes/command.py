"""Start the command line as a user does, and read what a run leaves.

``run`` is for what a run computes: its ranks are forked from a process that has imported the libraries, which takes a
second or two. ``command_line`` and ``start`` are for how a run starts and ends: a fresh interpreter and the launcher,
which takes four seconds, and eight with two ranks. Every verb, recipe and strategy has a test with a fresh one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from tests.dist.pool import free_port

ROOT = Path(__file__).parents[2]
FAST = ["evaluation=loss", "validation_dataset.limit=30", "dataset.limit=200", "step_scheduler.log_every_steps=1",
        "step_scheduler.local_batch_size=8"]  # fmt: skip
"""The embedded default without its generated answers and most of its rows."""
LIBRARIES = [
    "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor",
    "transformers", "transformers.models.auto", "transformers.models.llama.modeling_llama", "datasets", "peft",
    "accelerate", "hydra", "pydantic", "rich.progress", "jinja2",
]  # fmt: skip
"""What a run imports of others; our own modules each run imports anew, in its own order."""
TIMEOUT_SEC = 240


def run(*argv: str, status: int = 0, cwd: Path = ROOT, **env: str) -> str:
    """Run to the end, expect ``status``, and return everything that was printed.

    The ranks that ``launch.nproc_per_node`` asks for are started as torchrun would; a scheduler's job is left to the
    real command line.
    """
    if any(arg.startswith("launch=") for arg in argv):
        return command_line(*argv, status=status, cwd=cwd, **env)
    num_ranks = int([1, *(arg.partition("=")[2] for arg in argv if arg.startswith("launch.nproc_per_node="))][-1])
    with tempfile.TemporaryDirectory(prefix="run-") as folder:
        output = Path(folder) / "output"
        statuses = _run_forked(argv, num_ranks, output, cwd, {**os.environ, **env})
        return _expect(status, _status_of_job(statuses), output.read_text())


def command_line(*argv: str, verb: str = "run", status: int = 0, cwd: Path = ROOT, **env: str) -> str:
    """Do what ``run`` does in a fresh interpreter, where ranks are started by the launcher; any verb can be given."""
    process = start(*argv, verb=verb, cwd=cwd, **env)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SEC)
    finally:
        process.kill()
    return _expect(status, process.returncode, output)


def start(*argv: str, verb: str = "run", cwd: Path = ROOT, **env: str) -> subprocess.Popen:
    """Start a fresh command line with its output kept."""
    return subprocess.Popen(
        [sys.executable, "-m", f"automodel.{verb}", *argv],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run_forked(argv: tuple[str, ...], num_ranks: int, output: Path, cwd: Path, env: dict[str, str]) -> list[int]:
    _ensure_fork_server()
    if num_ranks > 1:
        env |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "GROUP_RANK": "0",
                "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}  # fmt: skip
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {} for rank in range(num_ranks)]
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_be_command_line, args=(argv, output, cwd, env | place)) for place in places]
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT_SEC
    try:
        for process in processes:
            process.join(max(0, end - time.monotonic()))
            assert process.exitcode is not None, f"did not end within {TIMEOUT_SEC} s:\n{output.read_text()}"
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def _ensure_fork_server() -> None:
    forkserver.set_forkserver_preload(LIBRARIES)
    # What the libraries read while they are imported: the ranks' own level, and neither threads nor a CUDA context,
    # which do not survive a fork.
    settings = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _be_command_line(argv: tuple[str, ...], output: Path, cwd: Path, env: dict[str, str]) -> None:
    """Become ``python -m automodel.run *argv``, in a process that was forked to this end."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))  # as ``python -m`` does
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["automodel.run", *argv]
    multiprocessing.set_start_method(None, force=True)  # a loader's workers are started as ever
    import torch

    torch.set_num_threads(1)
    from automodel.run import main

    main()


def _status_of_job(statuses: list[int]) -> int:
    """Return what the launcher would: a failure, else bad input, else stopped, else done."""
    return next((status for status in (2, 75, 0) if status in statuses and set(statuses) <= {0, 2, 75}), 1)


def _expect(status: int, got: int, output: str) -> str:
    assert got == status, f"ended with {got} instead of {status}:\n{output}"
    return output


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the metric records of one kind."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def wait_for_steps(run_dir: Path, num_steps: int) -> None:
    """Wait until a run that was started has logged so many steps."""
    for _ in range(1800):
        if (run_dir / "metrics.jsonl").exists() and len(records(run_dir)) >= num_steps:
            return
        time.sleep(0.1)
    pytest.fail(f"{run_dir} did not come to step {num_steps}")


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same whenever the same step is trained again."""
    return {key: record[key] for key in ("step", "epoch", "loss", "grad_norm", "lr", "num_label_tokens", "num_tokens")}


def load_as_the_screen_says(run_dir: Path) -> Any:
    """Run the line of Python that a finished run's last words give, and return the model that it loads."""
    (line,) = [line for line in (run_dir / "train.log").read_text().splitlines() if "  in Python: " in line]
    names: dict[str, Any] = {}
    exec(line.partition("in Python: ")[2], names)
    return names["model"]
