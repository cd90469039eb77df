"""Count the files and sockets that rank 0 of a run holds open, by the number of ranks.

    python -m benchmarks.open_files [--ranks 4,8,16,32] [--strategy ddp] [--tp-size 1] [--dp-replicate-size 1]

The ranks are forked, meet at a store as those of a real run do, and pass through what a run opens: the process group,
the watchdog, the mesh, a first rank per node, the checkpointer and a step over a tiny layer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

LIMIT = 1024
"""The open files that many systems allow a process by default."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="4,8,16,32")
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--dp-replicate-size", type=int, default=1)
    args = parser.parse_args()
    options = {} if args.strategy == "ddp" else {"tp_size": args.tp_size, "dp_replicate_size": args.dp_replicate_size}
    counts = {int(n): count(int(n), args.strategy, options) for n in args.ranks.split(",")}
    stages = list(next(iter(counts.values())))
    table = Table("ranks", *stages, title=f"open sockets of rank 0 ({args.strategy}{options or ''}), [all files]")
    for num_ranks, by_stage in counts.items():
        table.add_row(str(num_ranks), *(f"{sockets} [{files}]" for sockets, files in by_stage.values()))
    Console(width=140).print(table)
    (few, *_, many) = counts
    peak = {n: max(files for _, files in by_stage.values()) for n, by_stage in counts.items()}
    slope = (peak[many] - peak[few]) / (many - few)
    num_ranks = many + (LIMIT - peak[many]) / slope
    print(f"{slope:.1f} more files for each rank; {LIMIT} are reached at {num_ranks:.0f} ranks")


def count(num_ranks: int, strategy: str, options: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return (sockets, files) of rank 0 after each stage."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        job = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = [
            context.Process(target=_rank, args=(rank, job, strategy, options, Path(folder), theirs), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        found = ours.recv() if ours.poll(240) else None
        for process in processes:
            process.join(1 if found is None else 60)
            process.kill()
    if found is None:
        raise RuntimeError(f"{num_ranks} ranks did not come to an end")
    return found


def _rank(
    rank: int, job: dict[str, str], strategy: str, options: dict[str, int], folder: Path, pipe: Connection
) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), **job})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found: dict[str, tuple[int, int]] = {}
    stages = _stages(strategy, options, folder)
    for name, act in stages.items():
        act(lambda name=name: found.update({name: _open_files()}))
    if rank == 0:
        pipe.send(found)
    dist.barrier()
    time.sleep(1)
    os._exit(0)


def _stages(
    strategy_name: str, options: dict[str, int], folder: Path
) -> dict[str, Callable[[Callable[[], None]], None]]:
    from automodel.checkpoint.retention import Retention
    from automodel.checkpoint.training import Checkpointer
    from automodel.distributed import FirstRankPerNode, initialize_distributed
    from automodel.distributed.parallel.ddp import DDP
    from automodel.distributed.parallel.fsdp2 import FSDP2
    from automodel.distributed.parallel.strategy import data_parallel
    from automodel.distributed.runtime.watchdog import start_watchdog

    kept: dict[str, object] = {}
    strategy = DDP() if strategy_name == "ddp" else FSDP2(**options)

    def start(note: Callable[[], None]) -> None:
        kept["info"] = initialize_distributed("gloo", timeout_minutes=4)
        note()

    def watch(note: Callable[[], None]) -> None:
        kept["dog"] = start_watchdog(kept["info"], 4, report=print, before_exit=print)
        dist.barrier()
        note()

    def mesh(note: Callable[[], None]) -> None:
        kept["mesh"] = strategy.build_mesh(kept["info"])
        kept["dp"] = data_parallel(kept["mesh"])
        note()

    def first_rank(note: Callable[[], None]) -> None:
        with FirstRankPerNode(timeout=timedelta(minutes=4)):
            note()

    def checkpointer(note: Callable[[], None]) -> None:
        kept["checkpointer"] = Checkpointer(folder, retention=Retention(None, None, None), timeout_minutes=4)
        note()

    def step(note: Callable[[], None]) -> None:
        from torch.distributed.fsdp import fully_shard

        layer = torch.nn.Linear(64, 64)
        if strategy_name == "ddp":
            layer = strategy.parallelize(layer, dist_info=kept["info"], mesh=kept["mesh"])
        else:
            axes = ("dp_replicate", "dp_shard") if strategy.dp_replicate_size > 1 else "dp_shard"
            fully_shard(layer, mesh=kept["mesh"][axes])
        layer(torch.ones(1, 64)).sum().backward()
        dist.barrier()
        note()

    return {
        "process group": start, "watchdog": watch, "mesh": mesh, "first rank": first_rank,
        "checkpointer": checkpointer, "a step": step,
    }  # fmt: skip


def _open_files() -> tuple[int, int]:
    targets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # the one that listed them
            continue
    return sum(target.startswith("socket:") for target in targets), len(targets)


if __name__ == "__main__":
    main()
