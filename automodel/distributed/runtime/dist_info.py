"""Who this process is in the job: start-up from torchrun's, SLURM's or no environment, and a clean end."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from automodel import environment
from automodel.environment import environment_problems, number_from, slurm_exports
from automodel.logs import get_logger
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

log = get_logger(__name__)

DESTROY_SEC = 20.0
"""How long the end of the process group may take: a peer that hangs would hold it up for the collectives' time-out."""

_device: tuple[dist.ProcessGroup, torch.device] | None = None
"""The process group that was made here, and the device chosen for it."""
_before_destroy: list[Callable[[], None]] = []
_ending: threading.Thread | None = None
"""The thread that ends, or last ended, a process group."""
_registered_in: int | None = None
"""The process that ends its group at exit."""


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
    """Return this rank's number on its node, from the environment alone; usable before any process group."""
    return number_from(os.environ, environment.LOCAL_RANK, default=0)


def get_local_world_size_preinit() -> int:
    """Return the number of ranks on this node, from the environment alone; usable before any process group."""
    return number_from(os.environ, environment.LOCAL_WORLD_SIZE, default=1)


def get_store() -> dist.Store | None:
    """Return the store of the job's process group, or None where there is none; another thread must use a clone."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store() if dist.is_initialized() else None


def initialize_distributed(
    backend: str,
    timeout_minutes: float = 1,
    *,
    init_method: str | None = None,
    store: dist.Store | None = None,
) -> DistInfo:
    """Join the job's process group, or make one of a single process, and choose this rank's device.

    Every rank must call it. Calling it again returns the same facts; a group that something else has made is
    taken as it is. A single process needs neither environment variables nor a network. In a SLURM step, torchrun's
    variables are exported, so that other libraries find the same job. ``destroy_global_state`` runs at the end of the
    interpreter, unless it was called before.

    Args:
        backend: ``auto`` (by device: cuda nccl; cpu and mps gloo; xpu xccl, or ccl where torch was built without it;
            hpu and npu hccl; mlu cncl), a backend's name, or names by device as ``cpu:gloo,cuda:nccl``, of which those
            for devices that are not here are left out. Next to a device's backend there is always gloo for the CPU.
        timeout_minutes: how long the ranks may take to come, and afterwards a collective.
        init_method: a URL as ``torch.distributed.init_process_group`` takes it, instead of MASTER_ADDR and MASTER_PORT.
        store: a store that all ranks share, likewise.

    Raises:
        UserError: the environment contradicts itself, or a backend does not suit the device.
        StartError: some ranks did not come in time, or could not be connected.
    """
    import torch.distributed as dist

    from automodel.distributed.runtime.backends import backend_spec, choose_device

    if not dist.is_initialized():
        has_own_way = init_method is not None or store is not None
        problems = environment_problems(os.environ, needs_address=not has_own_way)
        if not timeout_minutes > 0:
            problems.append(f"timeout_minutes={timeout_minutes} must be more than 0")
        if problems:
            raise UserError(*problems)
        os.environ.update(slurm_exports(os.environ))
        device = choose_device(backend)
        _start_group(backend_spec(backend, device), device, timeout_minutes, init_method, store)
        _end_at_exit()
    return _facts()


def before_destroy(callback: Callable[[], None]) -> None:
    """Have ``destroy_global_state`` call ``callback`` before the group ends, the last one registered first.

    For what must not outlive the group, such as communication buffers. A failure of it is logged and stops nothing.
    """
    _before_destroy.append(callback)


def destroy_global_state() -> None:
    """Free DeepEP's buffers where there are any, then leave the process group.

    Safe to call twice and from any thread; Ctrl-C does not interrupt it half-way. It returns after ``DESTROY_SEC`` at
    the latest, also when a peer has died or hangs.
    """
    import torch.distributed as dist

    global _device
    with _no_interrupt():
        while _before_destroy:
            _try(_before_destroy.pop())
        _try(_free_deep_ep_buffers)
        if dist.is_initialized() and not (_ending is not None and _ending.is_alive()):
            _end_group()
        _device = None


def _from_group(method: str, names: tuple[str, ...], *, default: int) -> int:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return getattr(dist, method)()
    return number_from(os.environ, names, default=default)


def _start_group(
    spec: str, device: torch.device, timeout_minutes: float, init_method: str | None, store: dist.Store | None
) -> None:
    import torch
    import torch.distributed as dist

    from automodel.distributed.runtime.backends import refuse_shared_devices
    from automodel.distributed.runtime.open_files import allow_open_files
    from automodel.distributed.runtime.rendezvous import StartError, meet

    global _device
    rank, world_size = get_rank_safe(), get_world_size_safe()
    if world_size > 1:
        allow_open_files(world_size, is_main=rank == 0)
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    if init_method is not None or store is not None:
        is_in_url = init_method is not None and "world_size=" in init_method
        place = {"init_method": init_method, "store": store, **({} if is_in_url else place)}
    elif world_size == 1:
        # gloo looks its own host name up, which a laptop without a network may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_name())
        place["store"] = dist.HashStore()
    else:
        place["store"] = meet(rank, world_size, timeout_minutes)
    if device.type not in ("cpu", "mps"):
        if world_size > 1 and init_method is None and store is None:
            refuse_shared_devices(place["store"], device, rank=rank, world_size=world_size)
        torch.get_device_module(device.type).set_device(device.index)
    device_id = device if device.type == "cuda" and world_size > 1 else None
    try:
        dist.init_process_group(spec, timeout=timedelta(minutes=timeout_minutes), device_id=device_id, **place)
    except RuntimeError as error:  # dist.DistError is one, and gloo raises plain ones
        raise StartError(
            f"start-up: rank {rank} could not be connected with the other ranks: {error}. "
            "Look at the output of the others; if they wait too, see GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME."
        ) from error
    _device = (dist.group.WORLD, device)


def _end_at_exit() -> None:
    """Have the group ended with the interpreter, but for a fork of this process, whose connections are not its own."""
    global _registered_in
    if _registered_in == os.getpid():
        return
    _registered_in = pid = os.getpid()
    atexit.register(lambda: destroy_global_state() if os.getpid() == pid else None)


def _facts() -> DistInfo:
    import torch
    import torch.distributed as dist

    group = dist.group.WORLD
    device = _device[1] if _device is not None and _device[0] is group else _device_of(group)
    kind = "cpu" if device.type == "mps" else device.type
    backend = group._get_backend(torch.device(kind)).name()
    return DistInfo(backend, dist.get_rank(), dist.get_world_size(), device, dist.get_rank() == 0)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Return the device that a group made elsewhere is for: the one whose backend is not gloo, which serves any."""
    import torch

    if group.bound_device_id is not None:
        return group.bound_device_id
    for device in group._device_types:
        if device.type != "cpu" and torch.accelerator.is_available() and group._get_backend(device).name() != "gloo":
            return torch.device(device.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Leave Ctrl-C without effect for a moment; only the main thread may, and is the one that it interrupts."""
    handler = signal.getsignal(signal.SIGINT)
    is_ours = threading.current_thread() is threading.main_thread() and handler is not None
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, handler)


def _try(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception:
        log.warning("something failed at the end of the process group", exc_info=True)


def _free_deep_ep_buffers() -> None:
    """Free DeepEP's communication buffers, which libraries keep in a global variable of some module."""
    if "deep_ep" not in sys.modules:
        return
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            kind = type(value)
            # Some types give a descriptor for their module.
            if str(kind.__module__).partition(".")[0] == "deep_ep" and kind.__name__.endswith("Buffer"):
                setattr(module, name, None)  # without explicitly_destroy, the last reference frees it
                if getattr(value, "explicitly_destroy", False):
                    _try(value.destroy)


def _end_group() -> None:
    """End the process group from a thread of its own, which is left behind when a peer holds it up."""
    import torch.distributed as dist

    global _ending
    ways = [dist.destroy_process_group]
    if _facts().backend == "nccl":
        ways.append(dist.distributed_c10d._abort_process_group)  # does not wait for anybody
    for way in ways:
        _ending = threading.Thread(target=_try, args=(way,), name="end of the process group", daemon=True)
        try:
            _ending.start()
        except RuntimeError:  # the interpreter ends, and from Python 3.12 on starts no threads then
            return _try(way)
        _ending.join(DESTROY_SEC / len(ways))
        if not _ending.is_alive():
            return
    log.warning("the process group did not end within %.0f seconds; a peer hangs, or is gone", DESTROY_SEC)


def _loopback_name() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0] if names else "lo")
