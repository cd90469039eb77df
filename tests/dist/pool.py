"""Real gloo ranks for tests: forked once, then handed one function after another."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any


class RankPool:
    """``world_size`` forked processes in one gloo group.

    The parent must not have run a backward before: autograd's threads do not survive a fork.
    """

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("fork")
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-")
        store = f"{self._folder.name}/store"
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(*args)`` on every rank and return the results by rank; raises the first failure."""
        for pipe in self._pipes:
            pipe.send((function, args))
        outcomes = [pipe.recv() for pipe in self._pipes]
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
        return [result for result, _ in outcomes]

    def close(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=20)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, world_size: int, store: str, pipe: Any) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # so that a loader may start workers of its own
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)  # a hang becomes a failure that names its line
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((function(*args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    os._exit(0)


def free_port() -> int:
    """Return a port that nothing listened at a moment ago, and that no connection is given on its own account."""
    while True:
        port = random.randrange(16_000, 32_000)  # systems choose from above
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def run_fresh(function: Callable[[], object], world_size: int, env: Mapping[str, str] | None = None) -> list[Any]:
    """Run ``function`` in new processes that know of each other by the environment; None for one that was killed.

    ``env`` overrides what they are told.
    """
    context = multiprocessing.get_context("fork")
    job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {})}
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_call, args=(function, rank, job, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the process
        pipes.append(ours)
        processes.append(process)
    results = []
    for pipe in pipes:
        try:
            assert pipe.poll(40), "a process hangs"
            results.append(pipe.recv())
        except EOFError:
            results.append(None)
    for process in processes:
        process.kill()
        process.join()
    return results


def _call(function: Callable[[], object], rank: int, job: Mapping[str, str], pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank % 2), **job})
    pipe.send(function())
    pipe.close()
    time.sleep(1)  # the store of rank 0 serves ranks that are a little later
    os._exit(0)
