"""Who this process is in the job: start-up from the environment of torchrun, SLURM or neither, and a clean end."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from automodel import environment
from automodel.environment import environment_problems, number_from, slurm_exports
from automodel.logs import get_logger
from automodel.processes import signal_handler
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

log = get_logger(__name__)

DESTROY_SEC = 20.0
"""How long the end of the process group may take; for a peer that hangs it would wait for the collectives' time-out."""

_device: tuple[dist.ProcessGroup, torch.device] | None = None
"""The process group that was made here, and the device chosen for it."""
_ending: threading.Thread | None = None
"""The thread that ends, or last ended, a process group."""


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
    return _from_group("get_rank", environment.RANK, default=0)


def get_world_size_safe() -> int:
    """Return the number of ranks, from the process group or else the environment; 1 for a single process."""
    return _from_group("get_world_size", environment.WORLD_SIZE, default=1)


def get_local_rank_preinit() -> int:
    """Return this rank's index on its node, from the environment alone; usable before any process group."""
    return number_from(os.environ, environment.LOCAL_RANK, default=0)


def get_local_world_size_preinit() -> int:
    """Return the number of ranks on this node, from the environment alone; usable before any process group."""
    return number_from(os.environ, environment.LOCAL_WORLD_SIZE, default=1)


def get_store() -> dist.Store | None:
    """Return the store of the job's process group, if there is one; another thread must use a clone."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None


def initialize_distributed(backend: str, timeout_minutes: float = 1) -> DistInfo:
    """Join the job's process group, or make one of a single process, and choose this rank's device.

    Every rank must call it. Calling it again returns the same facts; a group made elsewhere (by
    ``torch.distributed.init_process_group`` with a URL or a store, for one) is used as it is. A single
    process needs neither environment variables nor a network. In a SLURM step, torchrun's variables are exported, so
    other libraries find the same job. ``destroy_global_state`` runs when the interpreter exits, unless it was called
    before.

    Args:
        backend: ``auto`` (by device: cuda nccl; cpu and mps gloo; xpu xccl, or ccl where torch was built without it;
            hpu and npu hccl; mlu cncl), a backend's name, or names by device as ``cpu:gloo,cuda:nccl``, of which those
            for devices that are not here are ignored. Next to a device's backend there is always gloo for the CPU.
        timeout_minutes: how long the ranks may take to come, and afterwards a collective.

    Raises:
        UserError: the environment contradicts itself, or a backend does not suit the device.
        StartError: some ranks did not come in time, or could not be connected.
    """
    import torch.distributed as dist

    from automodel.distributed.runtime.backends import backend_spec, choose_device

    if not dist.is_initialized():
        problems = environment_problems(os.environ)
        if not timeout_minutes > 0:
            problems.append(f"timeout_minutes={timeout_minutes} must be more than 0")
        if problems:
            raise UserError(*problems)
        os.environ.update(slurm_exports(os.environ))
        device = choose_device(backend)
        _start_group(backend_spec(backend, device), device, timeout_minutes)
        atexit.unregister(_destroy_at_exit)
        atexit.register(_destroy_at_exit, os.getpid())
    return _facts()


def destroy_global_state() -> None:
    """Free DeepEP's buffers if there are any, which must not outlive the group, then destroy the process group.

    Safe to call twice and from any thread; Ctrl-C does not interrupt it half-way. It returns after ``DESTROY_SEC`` at
    the latest, even if a peer has died or hangs.
    """
    import torch.distributed as dist

    global _device
    with signal_handler(signal.SIG_IGN, signal.SIGINT):
        _try(_free_deep_ep_buffers)
        if dist.is_initialized() and not (_ending is not None and _ending.is_alive()):
            _end_group()
        _device = None


def _from_group(method: str, names: tuple[str, ...], *, default: int) -> int:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return getattr(dist, method)()
    return number_from(os.environ, names, default=default)


def _start_group(spec: str, device: torch.device, timeout_minutes: float) -> None:
    import torch
    import torch.distributed as dist

    from automodel.distributed.runtime.backends import refuse_shared_devices
    from automodel.distributed.runtime.open_files import allow_open_files
    from automodel.distributed.runtime.rendezvous import StartError, rendezvous

    global _device
    rank, world_size = get_rank_safe(), get_world_size_safe()
    if world_size == 1:
        # gloo looks its own host name up, which a laptop without a network may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_name())
        store = dist.HashStore()
    else:
        allow_open_files(world_size, is_main=rank == 0)
        store = rendezvous(rank, world_size, timeout_minutes)
    if device.type not in ("cpu", "mps"):
        if world_size > 1:
            refuse_shared_devices(store, device, rank=rank, world_size=world_size)
        torch.get_device_module(device.type).set_device(device.index)
    device_id = device if device.type == "cuda" and world_size > 1 else None
    timeout = timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            spec, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
        )
    except RuntimeError as error:  # dist.DistError is one, and gloo raises plain ones
        raise StartError(
            f"start-up: rank {rank} could not be connected with the other ranks: {error}. "
            "If the output of the others shows that they wait too, check GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME."
        ) from error
    _device = (dist.group.WORLD, device)


def _destroy_at_exit(pid: int) -> None:
    if os.getpid() == pid:  # a fork of the process shares the group's connections, and must leave them alone
        destroy_global_state()


def _facts() -> DistInfo:
    import torch
    import torch.distributed as dist

    group = dist.group.WORLD
    device = _device[1] if _device is not None and _device[0] is group else _device_of(group)
    kind = "cpu" if device.type == "mps" else device.type
    backend = group._get_backend(torch.device(kind)).name()
    return DistInfo(backend, dist.get_rank(), dist.get_world_size(), device, dist.get_rank() == 0)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Return the device that a group made elsewhere is for: the one whose backend is not gloo, which serves all."""
    import torch

    if group.bound_device_id is not None:
        return group.bound_device_id
    for device in group._device_types:
        if device.type != "cpu" and torch.accelerator.is_available() and group._get_backend(device).name() != "gloo":
            return torch.device(device.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def _try(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:
        log.warning("a step of destroying the process group failed", exc_info=True)


def _free_deep_ep_buffers() -> None:
    """Free DeepEP's communication buffers, which libraries keep in a global variable of some module."""
    if "deep_ep" not in sys.modules:
        return
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            kind = type(value)
            # str, because the __module__ of some types is a descriptor.
            if str(kind.__module__).partition(".")[0] == "deep_ep" and kind.__name__.endswith("Buffer"):
                setattr(module, name, None)  # without explicitly_destroy, the last reference frees it
                if getattr(value, "explicitly_destroy", False):
                    _try(value.destroy)


def _end_group() -> None:
    """Destroy the process group in a thread, which is left behind if a peer holds it up."""
    import torch.distributed as dist

    global _ending
    ways = [dist.destroy_process_group]
    if _facts().backend == "nccl":
        ways.append(dist.distributed_c10d._abort_process_group)  # waits for nobody
    for way in ways:
        _ending = threading.Thread(target=_try, args=(way,), name="end of the process group", daemon=True)
        try:
            _ending.start()
        except RuntimeError:  # the interpreter exits, and from Python 3.12 on starts no threads then
            return _try(way)
        _ending.join(DESTROY_SEC / len(ways))
        if not _ending.is_alive():
            return
    log.warning("the process group was not destroyed within %.0f seconds; a peer hangs, or is gone", DESTROY_SEC)


def _loopback_name() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0] if names else "lo")
