"""Real gloo ranks for tests: forked once, then handed one function after another."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
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
