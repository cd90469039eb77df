"""Who this process is in the job: start-up from torchrun's, SLURM's or no environment, and a clean end."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from automodel.types import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DistInfo:
    """The process group as it really is.

    Attributes:
        backend: the backend in use for ``device``, e.g. ``gloo`` or ``nccl``.
        rank: global rank.
        world_size: number of processes in the job.
        device: the device that this rank computes on.
        is_main: whether this rank logs and writes (global rank 0).
    """

    backend: str
    rank: int
    world_size: int
    device: torch.device
    is_main: bool


def get_rank_safe() -> int:
    """Return the global rank, from the process group or else the environment; 0 for a single process."""
    return _from_group("get_rank", ("RANK", "SLURM_PROCID"), default=0)


def get_world_size_safe() -> int:
    """Return the number of ranks, from the process group or else the environment; 1 for a single process."""
    return _from_group("get_world_size", ("WORLD_SIZE", "SLURM_NTASKS"), default=1)


def get_local_rank_preinit() -> int:
    """Return this rank's number on its node, from the environment alone; usable before any process group."""
    return _from_env(("LOCAL_RANK", "SLURM_LOCALID"), default=0)


def get_local_world_size_preinit() -> int:
    """Return the number of ranks on this node, from the environment alone; usable before any process group."""
    return _from_env(("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"), default=1)


def initialize_distributed(backend: str, timeout_minutes: float = 1) -> DistInfo:
    """Join the job's process group, or make one of a single process, and choose this rank's device.

    Every rank must call it. Calling it again returns the same facts. A single process needs neither
    environment variables nor a network.

    Args:
        backend: ``auto`` (by device: cuda nccl, cpu and mps gloo, xpu xccl, hpu hccl) or a backend's name.
        timeout_minutes: how long a collective may take.

    Raises:
        UserError: the environment contradicts itself, or a backend does not suit the device.
    """
    import torch
    import torch.distributed as dist

    device = _choose_device(backend)
    if not dist.is_initialized():
        spec = _backend_spec(backend, device)
        rank, world_size = get_rank_safe(), get_world_size_safe()
        if not 0 <= rank < world_size:
            raise UserError(f"RANK={rank} does not fit WORLD_SIZE={world_size}")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        timeout = timedelta(minutes=timeout_minutes)
        if world_size == 1:
            # gloo looks its own host name up, which a laptop without a network may not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_name())
            dist.init_process_group(spec, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            _require_rendezvous()
            device_id = device if device.type == "cuda" else None
            dist.init_process_group(spec, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id)
    rank = dist.get_rank()
    return DistInfo(_backend_in_use(device), rank, dist.get_world_size(), device, rank == 0)


def destroy_global_state() -> None:
    """Leave the process group; safe to call twice, and not interrupted by Ctrl-C half-way."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    try:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, where no handler can be set
        previous = None
    try:
        dist.destroy_process_group()
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)


def _from_group(method: str, names: tuple[str, ...], *, default: int) -> int:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return getattr(dist, method)()
    return _from_env(names, default=default)


def _from_env(names: tuple[str, ...], *, default: int) -> int:
    for name in names:
        value = os.environ.get(name)
        # A batch script has SLURM's variables too, without being one of the ranks that srun starts.
        if value is None or (name.startswith("SLURM_") and "SLURM_STEP_ID" not in os.environ):
            continue
        try:
            return int(value)
        except ValueError:
            raise UserError(f"{name}={value!r} in the environment is not a whole number") from None
    return default


def _choose_device(backend: str) -> torch.device:
    import torch

    if backend == "gloo" or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator().type
    if kind == "mps":
        return torch.device("mps") if get_world_size_safe() == 1 else torch.device("cpu")
    local_rank, num_devices = get_local_rank_preinit(), torch.accelerator.device_count()
    if local_rank >= num_devices:
        raise UserError(
            f"local rank {local_rank} has no {kind} device: this node shows {num_devices}; "
            f"start at most {num_devices} processes a node, or choose dist_env.backend=gloo to run on the CPU"
        )
    return torch.device(kind, local_rank)


def _backend_spec(backend: str, device: torch.device) -> str | None:
    by_device = {"cuda": "nccl", "cpu": "gloo", "mps": "gloo", "xpu": _xpu_backend(), "hpu": "hccl"}
    name = by_device.get(device.type) if backend == "auto" else backend
    if name == "nccl" and device.type != "cuda":
        raise UserError("dist_env.backend=nccl needs a CUDA device and none is visible; use dist_env.backend=auto")
    if name is None or device.type in ("cpu", "mps"):
        return name
    return f"cpu:gloo,{device.type}:{name}"


def _xpu_backend() -> str:
    import torch.distributed as dist

    return "xccl" if getattr(dist, "is_xccl_available", lambda: False)() else "ccl"


def _backend_in_use(device: torch.device) -> str:
    import torch
    import torch.distributed as dist

    kind = "cpu" if device.type == "mps" else device.type
    return dist.group.WORLD._get_backend(torch.device(kind)).name()


def _require_rendezvous() -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"several ranks were started but {' and '.join(missing)} is not set: start with torchrun, "
            "or let launch.nproc_per_node start the workers"
        )


def _loopback_name() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0] if names else "lo")
