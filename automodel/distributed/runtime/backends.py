"""Which device a rank computes on, and which backend connects it with the others."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from automodel.distributed.runtime.dist_info import get_local_rank_preinit, get_world_size_safe
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

DEFAULTS = {
    "cuda": ("nccl",),
    "cpu": ("gloo",),
    "mps": ("gloo",),
    "xpu": ("xccl", "ccl"),
    "hpu": ("hccl",),
    "npu": ("hccl",),
    "mlu": ("cncl",),
}
"""By device, the backend that ``auto`` means: the first one that this torch has, or that a package adds."""
PACKAGES = {
    ("ccl", "xpu"): "oneccl_bindings_for_pytorch",
    ("ccl", "cpu"): "oneccl_bindings_for_pytorch",
    ("hccl", "hpu"): "habana_frameworks.torch.distributed.hccl",
    ("hccl", "npu"): "torch_npu",
    ("cncl", "mlu"): "torch_mlu",
}
"""The packages that register a backend that torch itself lacks, by backend and device; imported when needed."""
_OPTIONAL = ("gloo", "nccl", "xccl", "ucc", "mpi")
"""Backends that torch lists whether or not it was built with them."""
_NEEDS = {"nccl": ("cuda",), "xccl": ("xpu",), "ccl": ("xpu", "cpu"), "hccl": ("hpu", "npu"), "cncl": ("mlu",)}


def choose_device(backend: str) -> torch.device:
    """Return the device of this rank for ``backend``, as ``initialize_distributed`` takes it.

    Raises:
        UserError: the node has fewer devices than ranks.
    """
    import torch

    kind = _accelerator()
    named = [part.partition(":")[0].strip() for part in backend.split(",")] if ":" in backend else []
    if backend == "gloo" or kind is None or (named and kind not in named):
        return torch.device("cpu")
    if kind == "mps":
        return torch.device("mps") if get_world_size_safe() == 1 else torch.device("cpu")
    local_rank, num_devices = get_local_rank_preinit(), _num_devices()
    if local_rank >= num_devices and num_devices > 1 and not _has_devices_of_its_own():
        raise UserError(_too_few(local_rank, kind, num_devices))
    # A rank that sees a single device counts it as 0, whichever of the node's it is. If all ranks see the same one,
    # refuse_shared_devices notices.
    return torch.device(kind, local_rank % max(1, num_devices))


def backend_spec(backend: str, device: torch.device) -> str:
    """Return the backend for init_process_group; refuse one that is unknown, absent or for another kind of device."""
    if ":" in backend:
        pairs = dict(tuple(word.strip() for word in part.split(":", 1)) for part in backend.split(",") if ":" in part)
        kind = "cpu" if device.type == "mps" else device.type
        if kind not in pairs:
            raise UserError(f"dist_env.backend={backend} names no backend for {kind}, on which this rank computes")
        chosen = {"cpu": pairs.get("cpu", "gloo"), kind: pairs[kind]}
        for for_kind, name in chosen.items():
            _require(name, for_kind)
        return ",".join(f"{for_kind}:{name}" for for_kind, name in chosen.items())
    name = _default(device.type) if backend == "auto" else backend
    _require(name, device.type)
    return name if device.type in ("cpu", "mps") else f"cpu:gloo,{device.type}:{name}"


def refuse_shared_devices(store: dist.Store, device: torch.device, *, rank: int, world_size: int) -> None:
    """Raise the same UserError on every rank if two of them would compute on one device; all must call it."""
    import torch.distributed as dist

    devices = dist.PrefixStore("device", store)
    devices.set(str(rank), f"{get_local_rank_preinit()} {_num_devices()} {_identity(device)}")
    keys = [str(other) for other in range(world_size)]
    devices.wait(keys)
    first: dict[str, int] = {}
    for other, value in enumerate(devices.multi_get(keys)):
        local_rank, num_devices, identity = value.decode().split(" ", 2)
        if identity and first.setdefault(identity, other) != other:
            problem = _too_few(int(local_rank), device.type, int(num_devices))
            raise UserError(f"{problem}. Ranks {first[identity]} and {other} on {identity.split()[0]} would share one")


def _accelerator() -> str | None:
    """Return the kind of accelerator that is usable here; torch.accelerator does not know Habana's."""
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    with suppress(ImportError):
        import_module("habana_frameworks.torch")
    hpu = getattr(torch, "hpu", None)
    return "hpu" if hpu is not None and hpu.is_available() else None


def _num_devices() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else torch.hpu.device_count()


def _has_devices_of_its_own() -> bool:
    """Return whether SLURM gave each task its own devices (--gpus-per-task), which every task counts from 0."""
    is_per_task = "SLURM_GPUS_PER_TASK" in os.environ or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    return is_per_task and "SLURM_STEP_ID" in os.environ


def _identity(device: torch.device) -> str:
    """Return a name that no other device of the job has, the host first; empty if there is no way to know."""
    import torch

    uuid = None
    with suppress(Exception):
        uuid = torch.get_device_module(device.type).get_device_properties(device.index).uuid
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if uuid is None and _has_devices_of_its_own():
        return ""
    if uuid is None or "MIG" in visible:  # the parts of one device may share its uuid
        uuid = f"{visible}/{device.index}"
    return f"{socket.gethostname()} {uuid}"


def _too_few(local_rank: int, kind: str, num_devices: int) -> str:
    return (
        f"local rank {local_rank} has no {kind} device: this node shows {num_devices}; "
        f"start at most {num_devices} processes a node, or choose dist_env.backend=gloo to run on the CPU"
    )


def _default(kind: str) -> str:
    import torch.distributed as dist

    for name in DEFAULTS.get(kind, ()):
        if name in _usable(name, kind):
            return name
    try:
        return dist.get_default_backend_for_device(kind)
    except ValueError:
        raise UserError(f"torch has no default backend for {kind}: name one with dist_env.backend") from None


def _require(name: str, kind: str) -> None:
    """Raise UserError unless backend ``name`` can be used on a device of this kind."""
    needs = _NEEDS.get(name)
    if needs and kind not in needs:
        kinds = " or ".join("CUDA" if each == "cuda" else each for each in needs)
        raise UserError(
            f"dist_env.backend={name} needs a {kinds} device and none is visible; use dist_env.backend=auto"
        )
    usable = _usable(name, kind)
    if name in usable:
        return
    if (name, kind) in PACKAGES:
        package = PACKAGES[name, kind]
        raise UserError(f"dist_env.backend={name} comes with {package}, which cannot be imported here")
    raise UserError(
        f"dist_env.backend={name}: this torch has no such backend, only: {', '.join(sorted(usable))} "
        "(the backend of another package appears once that package is imported)"
    )


def _usable(name: str, kind: str) -> set[str]:
    """Return the backends that torch has, after importing the package that adds ``name``, if it is installed."""
    import torch.distributed as dist

    if (name, kind) in PACKAGES:
        with suppress(ImportError):
            import_module(PACKAGES[name, kind])
    registered = set(dist.Backend.backend_list) - {*_OPTIONAL, "undefined", "fake"}
    return registered | {optional for optional in _OPTIONAL if getattr(dist, f"is_{optional}_available")()}
